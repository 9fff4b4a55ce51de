"""Where PyTorch's wheels keep CUDA's libraries, and the environment in which relufy finds them.

    eval "$(python3 scripts/cuda_libraries.py)"     # LD_LIBRARY_PATH and RELUFY_CUDNN_LIB

A relufy built by `scripts/build-cuda.sh` needs libcublas, libcurand and others of CUDA 13 to start.
A PyTorch for CUDA 13 brings them as packages, into `site-packages/nvidia/cu13/lib`, and cuDNN into
`site-packages/nvidia/cudnn/lib`; a toolkit that the system's loader knows serves as well.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path


def nvidia_folders() -> list[Path]:
    """The folders `nvidia` of this interpreter's packages."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def library_folders() -> list[Path]:
    """Folders with libraries of CUDA 13."""
    return [lib for folder in nvidia_folders() if (lib := folder / "cu13" / "lib").is_dir()]


def cudnn() -> Path | None:
    """cuDNN 9 of the packages."""
    files = (folder / "cudnn" / "lib" / "libcudnn.so.9" for folder in nvidia_folders())
    return next((file for file in files if file.exists()), None)


def environment(attention: str | None = None) -> dict[str, str]:
    """This process's environment, with the libraries; those it names already come first.

    `attention` is what RELUFY_ATTENTION says: `cudnn` or `own` and nothing else; without it, or with
    `auto`, each shape gets what suits it.
    """
    settings = dict(os.environ)
    paths = [path for path in (settings.get("LD_LIBRARY_PATH"), *map(str, library_folders())) if path]
    if paths:
        settings["LD_LIBRARY_PATH"] = ":".join(paths)
    if (library := cudnn()) is not None:
        settings.setdefault("RELUFY_CUDNN_LIB", str(library))
    if attention is not None:
        settings.pop("RELUFY_ATTENTION", None)
        if attention != "auto":
            settings["RELUFY_ATTENTION"] = attention
    return settings


if __name__ == "__main__":
    for key in ("LD_LIBRARY_PATH", "RELUFY_CUDNN_LIB"):
        if (value := environment().get(key)) is not None:
            print(f"export {key}={shlex.quote(value)}")
