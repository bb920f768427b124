"""The house rules of the code base, as tests. They read the tree; where they import, it is in a process of its own."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertwire.deploy import cli

ROOT = Path(__file__).resolve().parents[1]

# Which of our folders each folder may import, besides itself.
MAY_IMPORT = {
    "scheduler": set(),
    "strategies": set(),
    "kernels": set(),
    "comm": {"kernels"},
    "moe": {"kernels", "comm", "scheduler"},
    "engine": {"kernels", "comm", "moe", "scheduler", "strategies"},
    "deploy": {"kernels", "comm", "moe", "scheduler", "strategies", "engine"},
    "expertwire": {"kernels", "comm", "moe", "scheduler", "strategies", "engine", "deploy"},
    "bench": {"kernels", "comm", "moe", "scheduler", "strategies", "engine", "deploy", "expertwire"},
}
LEAF = "expertwire.compiled"  # anybody may import it
CORE = ("scheduler", "strategies", "kernels", "comm", "moe", "engine")
MAY_READ_ENVIRONMENT = {"deploy"}
STATELESS = ("engine", "moe", "comm")  # no mutable state in modules
MUTABLE_CALLS = {"dict", "list", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATORS = {"append", "add", "extend", "insert", "update", "pop", "popitem", "clear", "remove", "discard", "setdefault"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

ENGINE_FLAGS = {
    "--revision", "--served-model-name",
    "--dtype", "--device", "--ep-size", "--launcher", "--ray-address", "--load-format", "--mock-step-time", "--quantization",
    "--numerics", "--attention-backend", "--max-model-len", "--generation-config",
    "--max-num-batched-tokens", "--max-num-seqs", "--max-queued-requests", "--max-queued-requests-per-tenant",
    "--chunked-prefill-size", "--scheduling-policy",
    "--aging", "--enable-prefix-caching", "--no-enable-prefix-caching", "--block-size",
    "--kv-cache-dtype", "--snapshot-every", "--snapshot-share", "--kv-cache-memory-bytes", "--gpu-memory-utilization",
    "--num-redundant-experts", "--topology", "--eplb-step-interval", "--all2all-backend", "--all2all-table",
    "--dispatch-dtype",
    "--enable-two-batch-overlap", "--no-enable-two-batch-overlap", "--threads-per-rank", "--seed", "--start-timeout",
    "--step-timeout",
}  # fmt: skip
# Every option is one more thing to learn, to test and to keep. Add one here only if nothing can be decided without it.
FLAGS = {
    "serve": {
        "--host", "--port", "--fronts", "--drain-timeout", "--max-connections",
        "--max-calls-per-connection", "--max-calls", "--max-message-mib", "--message-timeout", "--max-connection-idle",
        "--max-connection-age", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--tenants",
        "--insecure", "--no-insecure", "--audit-log", "--strategies", "--verifier", "--verifier-ca-certs",
        "--disable-log-stats", "--no-disable-log-stats", "--log-level", "--models", "--model-options", "--shares",
        "--cascade", "--decision-log",
        *ENGINE_FLAGS,
    },
    "generate": {
        "--prompt", "--temperature", "--top-p", "--top-k", "--min-p", "--max-tokens", "--stop", "--n", "--strategy",
        "--strategies", "--verifier", "--verifier-ca-certs",
        *ENGINE_FLAGS,
    },
    "demo": {"--launcher", "--ep-size"},
    "inspect": {"--ep-size", "--context", "--gpu-memory", "--kv-cache-dtype"},
    "explain": {
        "--device", "--ep-size", "--topology", "--all2all-backend", "--all2all-table", "--dispatch-dtype",
        "--enable-two-batch-overlap", "--no-enable-two-batch-overlap", "--kv-cache-dtype",
    },
    "experts": {"--ssl-ca-certs", "--token-file", "--png", "--json"},
    "token": set(),
    "replay": {"--threshold"},
    "calibrate cascade": {"--cascade", "--out", "--shortfall", "--seed"},
    "calibrate strategies": {
        "--prompts", "--candidate", "--baseline", "--grader", "--out", "--probe", "--greedy-probe", "--signal", "--num-bins",
        "--tolerance", "--strategies", "--verifier", "--verifier-ca-certs",
        "--temperature", "--top-p", "--top-k", "--min-p", "--max-tokens", "--stop", *ENGINE_FLAGS,
    },
    "bench throughput": {
        "--input-len", "--output-len", "--num-prompts", "--concurrency", "--temperature", "--json", *ENGINE_FLAGS,
    },
    "bench all-to-all": {
        "--model", "--backends", "--formats", "--ranks", "--tokens", "--hidden-size", "--steps", "--runs", "--sweep",
        "--loopback", "--json",
    },
    "bench control": {"--ranks", "--steps", "--channels", "--json"},
    "bench quantize": {"--formats", "--text", "--tokens", "--json"},
    "bench balance": {"--tokens", "--layers", "--seed", "--ranks", "--json"},
    "bench schedule": {
        "--trace", "--scheduling-policy", "--ranks", "--running", "--requests", "--seed", "--blocks", "--steps",
        "--max-num-batched-tokens", "--rate", "--chunked-prefill-size", "--ttft-ms", "--tpot-ms", "--overlap",
        "--no-overlap", "--enable-prefix-caching", "--no-enable-prefix-caching",
        "--host-time", "--timeline", "--record", "--replay", "--cost", "--peer",
        "--load-balancing", "--json",
    },
}  # fmt: skip


def sources(*folders: str) -> Iterator[tuple[str, Path, ast.Module]]:
    """Our modules, without generated ones: folder, file and syntax tree."""
    for folder in folders or MAY_IMPORT:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "_pb2" not in file.name:
                yield folder, file, ast.parse(file.read_text(), str(file))


def place(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{node.lineno}"


def imported(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every module that is imported anywhere in a file, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def folder_of(module: str) -> str | None:
    """Which of our folders a module lies in; None if it is not ours."""
    names = module.split(".")
    if names[0] != "expertwire":
        return None
    return names[1] if len(names) > 1 and names[1] in MAY_IMPORT else "expertwire"


def test_imports_go_one_way():
    """The one exception does not show here: `deploy/cli.py` imports a benchmark by name when asked to run it."""
    wrong = [
        f"{place(file, node)} imports {module}"
        for folder, file, tree in sources()
        for node, module in imported(tree)
        if folder_of(module) not in {None, folder, *MAY_IMPORT[folder]} and not module.startswith(LEAF)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_needs_neither_ray_nor_grpc_and_the_scheduler_no_torch():
    wrong = [
        f"{place(file, node)} imports {module}"
        for folder, file, tree in sources(*CORE)
        for node, module in imported(tree)
        if module.split(".")[0] in {"ray", "grpc", *(("torch",) if folder == "scheduler" else ())}
    ]
    assert not wrong, "\n".join(wrong)


HAVE_LOOPS = {"expertwire.scheduler.scheduler", "expertwire.engine.controller"}


@pytest.mark.parametrize(
    "module",
    [
        "expertwire",
        "expertwire.scheduler.scheduler",
        "expertwire.comm.control.channel",
        "expertwire.engine.messages",
        "expertwire.engine.rank_loop",
        "expertwire.engine.controller",
        "expertwire.engine.frontend.frontend",
        "expertwire.engine.engine",
        "expertwire.deploy.serve",
    ],
)
def test_these_processes_stay_small(module):
    """Only the controller's has compiled loops."""
    large = {"torch", "ray", "transformers"} if module in HAVE_LOOPS else {"torch", "ray", "transformers", "numba"}
    code = f"import sys, {module}; print(*sorted({large} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_configuration_does_not_come_from_the_environment():
    wrong = []
    for folder, file, tree in sources():
        for node in ast.walk(tree):
            name = ""
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                name = node.attr
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                name = " ".join(alias.name for alias in node.names)
            if ("environ" in name or "getenv" in name or "putenv" in name) and folder not in MAY_READ_ENVIRONMENT:
                wrong.append(f"{place(file, node)} uses os.{name}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_mixins():
    wrong = [
        f"{place(file, node)} {node.name}"
        for _, file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("mixin" in name.lower() for name in (node.name, *(ast.unparse(base) for base in node.bases)))
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_hold_no_mutable_state():
    wrong = [
        f"{file.relative_to(ROOT)}: {problem}"
        for _, file, tree in sources(*STATELESS)
        for problem in mutable_state(tree)
    ]
    assert not wrong, "\n".join(wrong)


def mutable_state(tree: ast.Module) -> Iterator[str]:
    """Containers at module level that could change.

    A table is allowed where its type promises not to change it (`Mapping`, `Sequence`, `Final`), or its name is in capitals and
    nothing in the module changes it.
    """
    tables = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if not names or names == ["__all__"] or not is_mutable(getattr(node, "value", None)):
            continue
        promise = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith(
            ("Mapping", "Sequence", "Final", "Collection")
        )
        tables.update(names)
        if not promise and not all(name.isupper() for name in names):
            yield f"line {node.lineno}: {names[0]} is mutable; make it a constant in capitals, or a value passed along"
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"
        elif changed := tables & set(changes(node)):
            yield f"line {node.lineno}: changes {', '.join(changed)}"


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MUTABLE_CALLS
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def changes(node: ast.AST) -> Iterator[str]:
    """Names of containers that a statement or call changes in place."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        yield ast.unparse(node.func.value)
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        yield ast.unparse(node.value)


def test_every_kernel_file_has_its_reference():
    missing = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "kernels" / "ops").glob("*.py"))
        if file.name
        not in ("__init__.py", "variants.py", "recurrent.py", "attention_block.py", "moe_block.py")  # which hold no op
        and not any(
            isinstance(node, ast.FunctionDef) and node.name.startswith("reference")
            for node in ast.parse(file.read_text()).body
        )
    ]
    assert not missing, missing


def test_the_wheel_has_every_package():
    """A package that is missing in the list is silently left out of the wheel, while an editable install works."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tree = set()
    for folder in MAY_IMPORT:
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            tree.add(".".join(parts if folder == "expertwire" else ("expertwire", *parts)))
    assert set(settings["packages"]) == tree
    assert {name: "expertwire." + name if name != "expertwire" else name for name in MAY_IMPORT} == {
        path: package for package, path in settings["package-dir"].items()
    }
    for package in tree:
        assert (ROOT / package.removeprefix("expertwire.").replace(".", "/") / "py.typed").is_file(), package


def test_files_of_tests_have_different_names():
    """pytest knows a module by its name alone, and collects but one of two. Interpreted ones have a process of their own."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py") if file.parent.name != "kernels_interpreted"]
    assert not {name for name in names if names.count(name) > 1}


def test_folders_refuse_their_bare_names():
    names = [name for name in MAY_IMPORT if name != "expertwire"]
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {names}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "expertwire." + name in str(error), error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_options_are_these():
    assert dict(command_flags()) == FLAGS


def command_flags() -> Iterator[tuple[str, set[str]]]:
    """Every command and its options."""

    def walk(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, set[str]]]:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for group in groups:
            for word, child in group.choices.items():
                yield from walk(child, f"{name} {word}".strip())
        if not groups:
            options = {option for action in parser._actions for option in action.option_strings}
            yield name, options - {"-h", "--help"}

    return walk(cli.make_parser(benches=cli.BENCHES), "")


BEGINNINGS = re.compile(r"(What|Of|How|Whether|Where|Who)\b")
NO_VERBS = re.compile(r"(The|A|An|Those|That|To|With|At|All|One|Every|Anything)\b")
# The last part of a tensor's name, as the `TD` in `x_TD`: capitals, digits, and the glossary's lower-case letters.
SUFFIX = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z0-9ecdrnvz]*[A-Z][A-Z0-9ecdrnvz]*)")
OF_GEMMS = set("MNK")  # their own in kernels


def test_docstrings_begin_as_sentences():
    """Say "Return the ..." and "Build a ...", not "What ..." or "Of x, ..."."""
    wrong = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}"
        for _, file, tree in sources(*MAY_IMPORT, "tests", "tools", "examples")
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node)) and BEGINNINGS.match(text)
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_docstrings_of_functions_begin_with_a_verb():
    """Say "Return the ..." also where a noun would do; a property's docstring says what it is."""
    wrong = [
        f"{place(file, node)} {text.splitlines()[0]}"
        for _, file, tree in sources(*MAY_IMPORT, "tools", "examples")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        and (text := ast.get_docstring(node)) and NO_VERBS.match(text)
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_a_class_has_its_name_for_itself():
    """No two public classes share a name; strategies, which import nothing of ours, have words of their own."""
    places: dict[str, list[str]] = {}
    for _, file, tree in sources("scheduler", "kernels", "comm", "moe", "engine", "deploy", "expertwire"):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(place(file, node))
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert not shared, shared


def shape_letters(tree: ast.Module) -> set[str]:
    """Return the capitals at the ends of a module's names."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {letter for name in names if (found := SUFFIX.fullmatch(name)) for letter in found[1] if letter.isupper()}


def glossary() -> dict[str, str]:
    """Return the meaning of each shape letter."""
    text = (ROOT / "docs" / "glossary.md").read_text().partition("## Words")[0]
    rows = re.findall(r"^\| ([A-Za-z](?:, [a-z])*) \| (.*) \|$", text, re.MULTILINE)
    found = [(letter, meaning) for letters, meaning in rows for letter in letters.split(", ")]
    assert len(dict(found)) == len(found), f"a letter has two meanings: {sorted(letter for letter, _ in found)}"
    return dict(found)


def test_shape_letters_are_explained_in_their_file_and_mean_what_the_glossary_says():
    meanings = glossary()
    wrong = []
    for folder, file, tree in sources():
        place = file.relative_to(ROOT)
        legend = ast.get_docstring(tree) or ""
        own = OF_GEMMS if folder == "kernels" else set()
        used = shape_letters(tree)
        wrong += [f"{place}: {letter} is not in docs/glossary.md" for letter in sorted(used - meanings.keys() - own)]
        missing = [letter for letter in sorted(used) if not re.search(rf"\b{letter}\b", legend)]
        if missing and not re.search(r"[Ll]etters as in", legend):
            wrong.append(f"{place}: the module's docstring does not explain {', '.join(missing)}")
        for letter, word in re.findall(r"\b([A-Z]) ([a-z]{4,})", legend):
            if letter in used & meanings.keys() - own and word[:4] not in meanings[letter]:
                wrong.append(f"{place}: {letter} is {word!r} here, in docs/glossary.md {meanings[letter]!r}")
    assert not wrong, "\n".join(wrong)


def test_line_budgets():
    """Not a rule but a hint: what grows beyond this is worth a second look."""
    for _, file, tree in sources():
        lines = len(file.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            warnings.warn(f"{file.relative_to(ROOT)} has {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    warnings.warn(f"{place(file, node)} {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}")


@pytest.mark.parametrize(
    ("source", "problems"),
    [
        ("TABLE = {'a': 1}\nLIMITS: tuple[int, ...] = (1, 2)\n_NAMES = [1]\n__all__ = ['x']", 0),
        ("kinds: Mapping[str, type] = {k.__name__: k for k in (int,)}", 0),
        ("class A:\n    def f(self):\n        items = {}\n        items['a'] = 1", 0),
        ("cache = {}", 1),
        ("_seen = collections.defaultdict(list)", 1),
        ("TABLE = {}\ndef f():\n    TABLE['a'] = 1", 1),
        ("TABLE = []\ndef f():\n    TABLE.append(1)", 1),
        ("x = 1\ndef f():\n    global x\n    x = 2", 1),
    ],
)
def test_the_rule_on_mutable_state_works(source, problems):
    assert len(list(mutable_state(ast.parse(source)))) == problems
