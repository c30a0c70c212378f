"""One way to say how far a long piece of work is: `progress(stage, share, detail)`."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called whenever there is something to say about the work that goes on."""

    def __call__(self, stage: str, share: float, detail: str = "") -> None:
        """Take in what is being done.

        Args:
            stage: what is being done, in a word or two, such as `timing layers`. `note`: the detail is a sentence that the user
                should read, and no measure of progress.
            share: the share of the stage that is done, 0 to 1.
            detail: what is done within the stage at this moment, such as a layer's name.

        """


def silent(stage: str, share: float, detail: str = "") -> None:
    """Say nothing."""


def part_of(progress: Progress, begin: float, end: float) -> Progress:
    """Return a progress for a part of a stage: what it is told as 0 to 1 is passed on as `begin` to `end`; notes as they are.

    Args:
        progress: what is told about the whole stage.
        begin: the share of the stage that is done before the part.
        end: the share of the stage that is done after it.

    """

    def told(stage: str, share: float, detail: str = "") -> None:
        progress(stage, share if stage == "note" else begin + (end - begin) * share, detail)

    return told
