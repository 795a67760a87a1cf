"""The page of errors: what each name at the beginning of a message means."""

from __future__ import annotations

import inspect

from millpond.store import errors


def error_page() -> str:
    """Every error, with what it means."""
    tree = (errors.__doc__ or "").partition("\n\n")[2]
    parts = [
        "# Errors",
        "A message says what was wrong, with which value, what the limit is and what to do. Each begins with the name "
        "by which it is found here. `InvalidInput` and all below it mean that nothing was changed; commands end with 2 for "
        "them and with 1 for the others.",
        f"```text\n{tree.strip()}\n```",
    ]
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.MillpondError)]
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        bases = ", ".join(base.__name__ for base in kind.__bases__)
        parts += [f"## {kind.__name__}", f"{inspect.getdoc(kind)}", f"A kind of {bases}."]
    return "\n\n".join(parts) + "\n"
