"""The tests are tested: small faults, applied one at a time, each of which the suite must notice."""
