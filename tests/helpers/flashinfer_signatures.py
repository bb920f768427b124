"""The signatures that `kernels/gpu/flashinfer.py` calls, so that its calls can be checked where FlashInfer is not installed.

    python tests/flashinfer_signatures.py FOLDER

writes them to flashinfer_signatures.json, from the sources of an unpacked wheel in FOLDER: importing them takes CUDA.
"""

import ast
import inspect
import json
import sys
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
SOURCES = {
    "prefill.py": {"BatchPrefillWithPagedKVCacheWrapper": ("__init__", "plan", "run")},
    # `plan` hands what follows `page_size` to `_plan_impl`.
    "decode.py": {"BatchDecodeWithPagedKVCacheWrapper": ("__init__", "_plan_impl", "run")},
    "mla/_batch_mla/_wrapper.py": {"BatchMLAPagedAttentionWrapper": ("__init__", "plan", "run")},
    "mla/_batch_mla/_contracts.py": {"MLAPlanMetadata": ("csr",)},
}


def extract(folder: Path) -> dict:
    """Return the version, and for each "Class.method" its parameters: name, kind, whether it has a default."""
    [metadata] = folder.glob("flashinfer_python-*.dist-info")
    found = {}
    for path, classes in SOURCES.items():
        tree = ast.parse((folder / "flashinfer" / path).read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in classes:
                functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                for name in classes[node.name]:
                    found[f"{node.name}.{name}"] = _parameters([f for f in functions if f.name == name][-1].args)
    return {"version": metadata.name.split("-")[1].removesuffix(".dist"), "signatures": found}


def _parameters(args: ast.arguments) -> list:
    """Return the parameters without `self` or `cls`."""
    plain = args.args[1:]
    first_default = len(plain) - len(args.defaults)
    rows = [[arg.arg, "POSITIONAL_OR_KEYWORD", i >= first_default] for i, arg in enumerate(plain)]
    rows += [[args.vararg.arg, "VAR_POSITIONAL", False]] if args.vararg else []
    rows += [
        [arg.arg, "KEYWORD_ONLY", default is not None]
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return rows + ([[args.kwarg.arg, "VAR_KEYWORD", False]] if args.kwarg else [])


def signature(name: str) -> inspect.Signature:
    """Return the signature of "Class.method" from the table."""
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds(parameter, getattr(kinds, kind), default=None if has_default else kinds.empty)
            for parameter, kind, has_default in json.loads(TABLE.read_text())["signatures"][name]
        ]
    )


if __name__ == "__main__":
    text = json.dumps(extract(Path(sys.argv[1])), indent=1)
    TABLE.write_text(text.replace("\n    ", " ").replace("\n   ]", " ]") + "\n")
