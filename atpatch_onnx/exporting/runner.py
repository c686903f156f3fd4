"""Load the model of this folder and check it on the golden inputs: python run.py."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent
ABOUT: dict[str, Any] = json.loads((HERE / "atpatch-export.json").read_text())


def session(name: str = ABOUT["run"], provider: str = "CPUExecutionProvider") -> Any:
    """A session over a model of this folder; a patch that lies beside it is made in memory."""
    source, options = str(HERE / name), ort.SessionOptions()
    options.log_severity_level = 3
    if not ABOUT["delta"]:
        return ort.InferenceSession(source, options, providers=[provider])
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(HERE)
    )
    old, delta = memoryview((HERE / name).read_bytes()), np.load(HERE / ABOUT["delta"])
    content, parts, at = delta["content"].data, [], 0
    for start, end, first, last in delta["places"].tolist():
        parts += [old[at:start], content[first:last]]
        at = end
    data = b"".join([*parts, old[at:]])
    if hashlib.sha256(data).hexdigest() != ABOUT["patched_sha256"]:
        raise SystemExit(f"{name} does not take the patch: copy it again")
    return ort.InferenceSession(data, options, providers=[provider])


if __name__ == "__main__":
    for file, digest in ABOUT["files"].items():
        path = HERE / file
        if not path.is_file():
            raise SystemExit(f"{file} is missing: copy it again")
        content = np.memmap(path, mode="r").data if path.stat().st_size else b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise SystemExit(f"{file} was altered: copy it again")
    for model in ABOUT["models"]:
        for golden in (np.load(HERE / file) for file in ABOUT["golden"]):
            feeds = {k[6:]: golden[k] for k in golden.files if k.startswith("input/")}
            wanted = {k[7:]: golden[k] for k in golden.files if k.startswith("output/")}
            for key, value in zip(wanted, session(model).run(list(wanted), feeds), strict=True):
                if not np.allclose(
                    value, wanted[key], ABOUT["rtol"], ABOUT["atol"], equal_nan=True
                ):
                    raise SystemExit(f"{model} does not give the golden output '{key}'")
    print(f"{', '.join(ABOUT['models'])}: files intact, golden answers right")
