"""Reading items ahead in threads: objects of a store, image files."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

READ_AHEAD = 8  # objects of a store that are read at once
A = TypeVar("A")
B = TypeVar("B")


def map_ahead(function: Callable[[A], B], items: Iterable[A], ahead: int = READ_AHEAD) -> Iterator[B]:
    """Yield function(item) of each item, in order, while threads work on the next `ahead` items.

    So many results are in memory at most. Raises what the function raises, once its item is due.
    """
    left = iter(items)
    with ThreadPoolExecutor(ahead, "defuse-read") as pool:
        due = deque(pool.submit(function, item) for item in itertools.islice(left, ahead))
        while due:
            result = due.popleft().result()
            due.extend(pool.submit(function, item) for item in itertools.islice(left, 1))
            yield result
