"""Other libraries' classes with our kernels inside: one changed import in a training loop that is there already.

One file per library, imported by its name (``protomem_kernels.compat.insightface``), so that none is needed but the one
that is used. docs/migrating.md lists every difference with its reason.
"""
