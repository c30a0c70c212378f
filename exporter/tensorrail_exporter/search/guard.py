"""How closely the outputs of a faster network must agree with the dense network's."""

from __future__ import annotations

import math

from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.records import Record


class Guard(Record):
    """How closely the outputs must agree with the dense model's, on inputs that nothing was fitted to."""

    min_agreement: float = 0.9
    """Smallest top-1 agreement, which is the share of inputs with the same best class, for class scores; default 0.9."""
    max_difference: float | None = None
    """Largest difference of the outputs, as a multiple of their standard deviation (see `Agreement`); default: no limit."""

    def check(self) -> None:
        """Raise `UsageError` for a limit that is out of range."""
        if not 0 <= self.min_agreement <= 1:
            raise UsageError(f"min_agreement: expected a share from 0 to 1, got {self.min_agreement:g}")
        if self.max_difference is not None and not self.max_difference > 0:
            raise UsageError(f"max_difference: expected a positive number, got {self.max_difference:g}")

    def refusal(self, measured: Agreement) -> str:
        """Return why a measured agreement is not enough; empty if it is."""
        if measured.agreement is not None and measured.agreement < self.min_agreement:
            return (
                f"NOT accurate enough: top-1 agreement with the dense model is {100 * measured.agreement:.1f} % on the "
                f"held-out inputs, expected at least {100 * self.min_agreement:g} %"
            )
        if not math.isfinite(measured.difference):
            return "NOT accurate enough: the outputs on the held-out inputs are not finite"
        if self.max_difference is not None and measured.difference > self.max_difference:
            return (
                f"NOT accurate enough: outputs differ by {measured.difference:.2e} of their standard deviation on the "
                f"held-out inputs, expected at most {self.max_difference:.2e}"
            )
        return ""

    def described(self, *, scores: bool) -> str:
        """Return the limits in words, for outputs that are scores of classes or not."""
        words = [f"a top-1 agreement of at least {100 * self.min_agreement:g} %"] if scores else []
        if self.max_difference is not None:
            words.append(f"a difference of the outputs of at most {self.max_difference:g} of their standard deviation")
        return " and ".join(words)
