"""Describe the machine: what is installed, and, once torch is loaded, what it computes on."""

import platform
from importlib.metadata import version
from importlib.util import find_spec

_LIBRARIES = ("torch", "transformers", "numpy", "pillow", "simplejpeg")
# what the extras bring, by the name that Python imports
_OPTIONAL = (
    "datasets",
    "faiss",
    "fastapi",
    "matplotlib",
    "onnxruntime",
    "open_clip",
    "pymilvus",
    "sentence_transformers",
    "sentencepiece",
    "tensorboard",
)


def installed() -> dict[str, str]:
    """Return versions, and the optional libraries that are there; none of them is imported."""
    optional = [name for name in _OPTIONAL if find_spec(name)]
    return {
        "crosstill": version("crosstill"),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "extras": ", ".join(optional) or "none",
    }


def device() -> dict[str, str]:
    """Return what a run would compute on, and whether bfloat16 is fast there."""
    import torch  # which takes seconds

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    fast = cuda or torch.cpu.get_capabilities().get("amx_tile")
    return {"device": name, "bf16": "yes" if fast else "too slow here"}
