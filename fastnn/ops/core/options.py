"""An op's options as a few numbers: the dispatcher takes some 100 ns for each argument that it is handed."""

from __future__ import annotations


class PackedOptions(dict):
    """From options to the numbers that an op's packed overload takes, a byte an option, or to None where one does not fit.

    Parameters
    ----------
    is_optional : list of bool
        Of each option, whether it may be None.
    """

    per_number = 7
    most = 4096

    def __init__(self, is_optional: list[bool]) -> None:
        super().__init__()
        self.is_optional = is_optional

    def __missing__(self, options: tuple) -> tuple[int, ...] | None:
        values = []
        for value, optional in zip(options, self.is_optional, strict=True):
            # None is packed as 0, which leaves no place for an optional 0.
            if value is None:
                value = 0
            elif type(value) not in (int, bool) or not optional <= value < 256:
                return None
            values.append(int(value))
        starts = range(0, len(values), self.per_number)
        numbers = tuple(
            sum(v << 8 * i for i, v in enumerate(values[at : at + self.per_number])) for at in starts
        )
        if len(self) < self.most:
            self[options] = numbers
        return numbers


# The byte of the first number that holds no options.
_ALGORITHMS = 56


def with_algorithms(words: tuple[int, ...], numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The same with the numbers of algorithms: four bits for the first, three for a second."""
    return (words[0] | sum([n << _ALGORITHMS + 4 * i for i, n in enumerate(numbers)]), *words[1:])
