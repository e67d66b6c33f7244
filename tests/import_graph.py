"""What every module of ours imports and uses, read from the source without running it.

`ImportGraph.reaches` follows imports through our own modules, as Python does: importing ``common.view`` also runs
``common/__init__.py``. Imports under ``if TYPE_CHECKING`` do not run and do not count; imports inside functions do.
"""

import ast
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OURS = ("services", "common", "kernels")


@dataclass(frozen=True, slots=True)
class Module:
    """``imports`` and ``uses`` are absolute dotted names; ``from a import b`` imports both ``a`` and ``a.b``."""

    name: str
    path: str  # relative to the root, with forward slashes
    imports: frozenset[str]
    uses: frozenset[str]  # attributes of imported names: "time.monotonic", whatever alias the file gave it


class _Names(ast.NodeVisitor):
    def __init__(self, package: str) -> None:
        self.package = package
        self.imports: set[str] = set()
        self.uses: set[str] = set()
        self._meaning: dict[str, str] = {}  # local name -> dotted name

    def visit_If(self, node: ast.If) -> None:
        guarded = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.orelse if guarded else [node.test, *node.body, *node.orelse]:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports.add(alias.name)
            top = alias.name.partition(".")[0]
            self._meaning[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            parents = parents[: len(parents) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        self.imports.add(base)
        for alias in node.names:
            self.imports.add(f"{base}.{alias.name}")
            self.uses.add(f"{base}.{alias.name}")
            self._meaning[alias.asname or alias.name] = f"{base}.{alias.name}"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := self._dotted(node):
            self.uses.add(dotted)
        self.generic_visit(node)

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self._meaning.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self._dotted(node.value)):
            return f"{base}.{node.attr}"
        return None


def read_module(root: Path, file: Path) -> Module:
    relative = file.relative_to(root)
    parts = relative.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    names = _Names(name if is_package else name.rpartition(".")[0])
    names.visit(ast.parse(file.read_text(), filename=str(file)))
    return Module(name, relative.as_posix(), frozenset(names.imports), frozenset(names.uses))


@dataclass(frozen=True, slots=True)
class ImportGraph:
    modules: dict[str, Module]

    @classmethod
    def read(cls, root: Path) -> "ImportGraph":
        """All modules of `OURS` under ``root``."""
        files = (file for top in OURS for file in sorted((root / top).rglob("*.py")))
        return cls({module.name: module for module in (read_module(root, file) for file in files)})

    def ours_imported_by(self, module: Module) -> Iterator[Module]:
        """Modules of ours that run when ``module`` is imported, directly: targets and the packages around them."""
        wanted = {module.name, *module.imports}
        for name in sorted(wanted):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                found = self.modules.get(".".join(parts[:end]))
                if found is not None and found is not module:
                    yield found

    def reaches(
        self, start: Module, fault: Callable[[Module], str | None], follow: Callable[[Module], bool] = lambda _: True
    ) -> str | None:
        """The shortest chain of imports from ``start`` to a module with a ``fault``, as text; None if there is none.

        Modules for which ``follow`` is false are neither looked at nor passed through.
        """
        came_from: dict[str, Module | None] = {start.name: None}
        queue = deque([start])
        while queue:
            module = queue.popleft()
            if why := fault(module):
                chain: list[str] = []
                step: Module | None = module
                while step is not None:
                    chain.insert(0, step.path)
                    step = came_from[step.name]
                return f"{' -> '.join(chain)}: {why}"
            for target in self.ours_imported_by(module):
                if target.name not in came_from and follow(target):
                    came_from[target.name] = module
                    queue.append(target)
        return None
