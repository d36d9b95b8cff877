"""Who computes the operators: one folder or file per backend, what they share, and the choice among them.

``protocol`` says what a backend is, ``operators`` what a backend may know of an operator, ``choice`` which backend
serves a call and why the others do not. ``native`` is what the two compiled ones, ``cpu`` and ``cuda``, share.
"""
