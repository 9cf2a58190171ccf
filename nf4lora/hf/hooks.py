"""Functions of other libraries with ours around them, put in once and taken out again."""

import functools
from collections.abc import Callable
from typing import Any


class Hooks:
    """What one `install()` has put around functions of another library."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._originals)

    def around(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        """Let `owner.name(*args)` be `ours(original, *args)`; `owner` is a module or a class that has `name` of its own."""
        original = vars(owner)[name]

        @functools.wraps(original)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            return ours(original, *args, **kwargs)

        setattr(owner, name, hooked)
        self._originals.append((owner, name, original))

    def remove(self) -> None:
        while self._originals:
            setattr(*self._originals.pop())
