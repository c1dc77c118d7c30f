"""What the processes of one `aeolian up` log: lines to read, or one JSON object a line for machines.

Keys of an object: `time` (RFC 3339, UTC), `level`, `process`, `logger`, `message`, and `exception` where there is one.
"""

import json
import logging
import time
from typing import Literal

LogFormat = Literal["text", "json"]
TEXT = "%(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    def __init__(self, process: str):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        exception = self.formatException(record.exc_info) if record.exc_info else ""
        return json_line(self._process, record.getMessage(), record.levelname, record.name, record.created, exception)


def configure(process: str, level: str, log_format: LogFormat) -> None:
    """Let this process log to its standard error, which the supervisor reads."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def json_line(
    process: str, message: str, level: str = "INFO", logger: str = "", at: float | None = None, exception: str = ""
) -> str:
    at = time.time() if at is None else at
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    fields = {"time": f"{stamp}.{int(at % 1 * 1e6):06d}Z", "level": level, "process": process}
    if logger:
        fields["logger"] = logger
    fields["message"] = message
    if exception:
        fields["exception"] = exception
    return json.dumps(fields, ensure_ascii=False)
