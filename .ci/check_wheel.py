"""Whether the adamezo that is installed here is whole: `make wheel-check` runs it on a wheel.

It is run outside of the checkout, by an environment that holds torch and the wheel alone, and with
a PATH on which there is no compiler.
"""

import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

import adamezo
import adamezo_kernels
from adamezo_kernels.backends import native

for package in (adamezo, adamezo_kernels):
    place = Path(package.__file__ or "").resolve()
    assert Path(sys.prefix).resolve() in place.parents, f"{place} is not in {sys.prefix}"
    assert (place.parent / "py.typed").is_file(), f"{package.__name__} has no py.typed"
compilers = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
assert not compilers, f"{compilers} are on PATH: this checks an installation without them"

able, said = native.availability()
assert able, said
version = metadata.version("adamezo")
built = native.build_report()["version"]
assert version == adamezo.__version__ == built, (version, adamezo.__version__, built)

# Torch's own: a second one would start a thread for every core again.
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
assert len(runtimes) == 1, f"OpenMP runtimes in one process: {sorted(runtimes)}"

torch.manual_seed(0)
model = torch.nn.Linear(10, 2)
inputs, labels = torch.randn(64, 10), torch.randint(2, (64,))
optimizer = adamezo.AdaMeZO(model.named_parameters(), lr=3e-2, seed=0)
losses = [
    float(optimizer.step(lambda: torch.nn.functional.cross_entropy(model(inputs), labels)))
    for _ in range(50)
]
assert losses[-1] < losses[0], (losses[0], losses[-1])
print(f"adamezo {version}, torch {torch.__version__}, {said}: loss {losses[0]:.3f}")
print(f"after 50 steps {losses[-1]:.3f}; OpenMP of {', '.join(runtimes)}")
