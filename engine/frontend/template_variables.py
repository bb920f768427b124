"""Which variables a Jinja template reads that it does not set itself.

Jinja's own `meta.find_undeclared_variables` counts every name that is set in only some branches, whether or not it is read
elsewhere; this counts a name where it is read and not certainly set.
"""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import nodes


def free_variables(template: nodes.Template) -> frozenset[str]:
    """The names that a template looks up in what it is given, globals of its environment included."""
    found: set[str] = set()
    _visit_all(template.body, set(), found)
    return frozenset(found)


def _visit_all(children: Iterable[nodes.Node | None], known: set[str], found: set[str]) -> set[str]:
    for child in children:
        if child is not None:
            _visit(child, known, found)
    return known


def _visit(node: nodes.Node, known: set[str], found: set[str]) -> None:
    """Adds to `known` what is certainly set after `node`, to `found` what is read before it is."""
    match node:
        case nodes.Name():
            (known if node.ctx != "load" or node.name in known else found).add(node.name)
        case nodes.Assign():
            _visit_all((node.node, node.target), known, found)
        case nodes.AssignBlock():
            _visit_all((node.filter, *node.body), set(known), found)
            _visit(node.target, known, found)
        case nodes.For():
            _visit(node.iter, known, found)
            _visit_all((node.target, node.test, *node.body), known | {"loop"}, found)
            _visit_all(node.else_, set(known), found)
        case nodes.If():
            _visit_all((node.test, *(branch.test for branch in node.elif_)), known, found)
            branches = [node.body, *(branch.body for branch in node.elif_), node.else_]
            known |= set.intersection(*(_visit_all(branch, set(known), found) for branch in branches))
        case nodes.Macro() | nodes.CallBlock():
            if isinstance(node, nodes.CallBlock):
                _visit(node.call, known, found)
            else:
                known.add(node.name)
            _visit_all(node.defaults, known, found)
            _visit_all((*node.args, *node.body), known | {"caller", "varargs", "kwargs"}, found)
        case nodes.With():
            _visit_all(node.values, known, found)
            _visit_all((*node.targets, *node.body), set(known), found)
        case nodes.Scope() | nodes.FilterBlock():
            _visit_all(node.iter_child_nodes(), set(known), found)
        case _:
            _visit_all(node.iter_child_nodes(), known, found)
