"""Two copies of the package in one process: a notebook's reload, and runners that purge ``sys.modules``."""

import subprocess
import sys

CODE = """
import gc, importlib, sys
import torch

def purge():
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "protomem_kernels"}

def train(pmk):
    loss_fn = pmk.PrototypeMemoryLoss(4, 4, prototype_gradient="fresh")
    embeddings = torch.arange(12.0).cos().reshape(3, 4).requires_grad_()
    loss_fn(embeddings, torch.tensor([5, 6, 7]))
    loss = loss_fn(embeddings, torch.tensor([5, 6, 5]))
    loss.backward()
    return loss.item(), embeddings.grad.tolist(), loss_fn.memory.prototypes.tolist()

class Watched(torch.utils._python_dispatch.TorchDispatchMode):  # past it nothing goes: the registered operators run
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

import protomem_kernels as first
from protomem_kernels.backends import choice as first_choice
expected = train(first)
with Watched():
    assert train(first) == expected
first_loss = first.margin_softmax_loss(torch.ones(2, 4, requires_grad=True), torch.eye(4), torch.tensor([0, 1]))

old = purge()
import protomem_kernels as second
from protomem_kernels.backends import choice
assert second is not first
backends = [[one.name for one in module.BACKENDS.values() if one.kernels] for module in (first_choice, choice)]
assert backends[0] == backends[1], backends
for copy in (first, second, first):
    assert train(copy) == expected
    with Watched():
        assert train(copy) == expected
first_loss.backward()  # made before the second copy was

# What the dispatcher calls is the newest copy's.
served = []
kernel = choice.BACKENDS["reference"].kernel("enqueue_")
choice.BACKENDS["reference"].add("enqueue_", lambda *args: (served.append(1), kernel(*args))[1])
with second.use_backend("reference"):
    train(second)
assert served

# The first copy may be garbage, with all that it held.
del first, first_choice, first_loss, old, copy
gc.collect()
assert train(second) == expected
with Watched():
    assert train(second) == expected

# A notebook's autoreload runs a module again.
importlib.reload(sys.modules["protomem_kernels.ops.enqueue"])
importlib.reload(second)
assert train(second) == expected

sys.modules["protomem_kernels.ops.schemas"].SCHEMAS["enqueue_"] = "(Tensor another) -> Tensor"
try:
    importlib.reload(sys.modules["protomem_kernels.ops.enqueue"])
except RuntimeError as error:
    assert "protomem::enqueue_ is (Tensor(a!) memory_prototypes" in str(error), error
    assert "restart the process to use another version of protomem_kernels" in str(error), error
else:
    raise AssertionError("another schema was taken")
"""


def test_a_second_copy_works_and_leaves_the_first_working():
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
