"""Log lines of an App, in the batches that they are stored and handed out in, and who wants which."""

import msgspec

from aeolian.domain.link import LogLine


class LogBatch(msgspec.Struct, frozen=True):
    """Consecutive lines of one container. `last_seq - first_seq + 1 == max(1, len(lines))`."""

    app_id: str
    first_seq: int
    last_seq: int
    task_id: str
    function_id: str
    root_function_id: str
    """The Function that `function_id` is a variant of, or `function_id` itself."""
    image_id: str
    lines: tuple[LogLine, ...] = ()
    is_end: bool = False
    at: float = 0.0
    """Of an end mark: when it was made."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Whose lines these are."""
        return self.app_id, self.task_id, self.function_id, self.image_id

    @property
    def num_bytes(self) -> int:
        """About what the lines take in memory."""
        return num_bytes(self.lines)

    def after(self, seq: int) -> "LogBatch":
        """The part of this batch after line `seq`."""
        if self.first_seq > seq:
            return self
        return msgspec.structs.replace(self, first_seq=seq + 1, lines=self.lines[seq + 1 - self.first_seq :])


class LogFilter(msgspec.Struct, frozen=True):
    """Which lines somebody wants; "" and 0 mean any."""

    fd: int = 0
    function_id: str = ""
    """Lines of this Function and of its variants."""
    variant_function_id: str = ""
    """Lines of exactly this Function or variant."""
    function_call_id: str = ""
    input_id: str = ""
    task_id: str = ""
    search_text: str = ""
    without_builds: bool = False
    """No lines of image builds."""

    def of(self, batch: LogBatch) -> bool:
        """Whether the batch can hold such lines at all."""
        return (
            (not self.task_id or batch.task_id == self.task_id)
            and not (self.without_builds and batch.image_id)
            and (not self.function_id or self.function_id in (batch.function_id, batch.root_function_id))
            and (not self.variant_function_id or batch.function_id == self.variant_function_id)
        )

    def lines(self, batch: LogBatch) -> tuple[LogLine, ...]:
        if not self.of(batch):
            return ()
        if not (self.fd or self.function_call_id or self.input_id or self.search_text):
            return batch.lines
        return tuple(
            line
            for line in batch.lines
            if (not self.fd or line.fd == self.fd)
            and (not self.function_call_id or line.function_call_id == self.function_call_id)
            and (not self.input_id or line.input_id == self.input_id)
            and (not self.search_text or self.search_text in line.data)
        )


class TaskChange(msgspec.Struct, frozen=True):
    """A container reached another state: shown by a follower's spinner, not kept."""

    task_id: str
    function_id: str
    state: int
    """A TaskState of the protocol."""


def num_bytes(lines: tuple[LogLine, ...]) -> int:
    return sum(len(line.data) for line in lines) + 64 * len(lines)
