"""What is written to a run folder, and the guarantee that a kill at any moment costs at most the batch in flight.

    run.json                     what was asked for and where it ran
    cells/<key>/manifest.json    written last and atomically: a cell without it is not done
    cells/<key>/samples.jsonl    one line a sample, appended and flushed a batch at a time
    timings.jsonl                one line a measured run, raw
    images/<image_id>.png        what the report's sample explorer shows

Lines are appended in whole and flushed to the operating system, so a SIGKILL can only tear the last one; readers drop a
torn last line, and a writer cuts it off before it appends. A broken line anywhere else is an error, never skipped.
Imports neither torch nor the model: the report reads through this file too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA_VERSION = 1
NUM_EXPLORER_SAMPLES = 12  # the first so many samples of a task, by sample_id, have their image in the run folder


class RecordsError(ValueError):
    """A run folder that cannot be read or written; the message names the file."""


def setting_id(method: str, budget: float | None = None, policy: str | None = None, value: float | None = None) -> str:
    """`<method>:<policy>`, `<method>:<policy>(<value>)`, `<method>@<budget>` or, without a dial, `<method>`. A budget
    above 1 is a number of visual tokens (`budgets.match`): "fastv@0.25", "fastv@192".

    Args:
        value: what tells settings of one policy apart: the configuration of "fixed", the cost weight of "router", the
            threshold of "cascade".
    """
    if policy is not None:
        return f"{method}:{policy}" if value is None else f"{method}:{policy}({value:g})"
    return method if budget is None or method == "dense" else f"{method}@{budget:g}"


def digest(value: Any) -> str:
    """A hash of JSON data that is the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def pack_bits(kept: Sequence[bool] | None) -> str | None:
    """A mask of kept visual tokens, row-major over the full grid, as base64 of packed bits (first token = high bit)."""
    if kept is None:
        return None
    return base64.b64encode(np.packbits(np.asarray(kept, dtype=bool)).tobytes()).decode("ascii")


def unpack_bits(packed: str, num_visual: int) -> list[bool]:
    """The inverse of `pack_bits` for a full grid of `num_visual` tokens."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8))
    if not num_visual <= len(bits) < num_visual + 8:
        raise RecordsError(f"a mask of {len(bits)} bits does not fit {num_visual} visual tokens")
    return bits[:num_visual].astype(bool).tolist()


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """All fields, as they are written."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]):
        """Unknown fields are dropped, so that a newer minor schema stays readable."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


@dataclass(frozen=True)
class SampleRecord(_Record):
    """One sample under one setting. If `error` is set, `answer` is null, `score` is 0 and the costs may be null."""

    sample_id: str
    image_id: str
    question: str
    references: list[str]
    answer: str | None
    score: float
    difficulty: int
    error: str | None = None
    num_text: int | None = None
    num_visual: int | None = None  # at full size, before any reduction
    grid: list[int] | None = None  # rows, columns of the visual tokens at full size
    decoder_flops: int | None = None  # prefill of the decoder layers, 2 x MACs
    dense_decoder_flops: int | None = None  # the same for the unmodified model on this sample
    flops: dict[str, int] | None = None  # prefill by part
    visual_tokens: list[int] | None = None  # live visual tokens at each decoder layer
    kv_bytes: int | None = None
    layer_flops: list[int] | None = None  # prefill of each decoder layer, full-square attention
    confidence: float | None = None  # probability of the first answer token
    routing: list[float] | None = None  # the router's logit of each configuration, in the first configuration's cell
    configuration: int | None = None  # index of the one that answered, of a method that has several
    attempts: list[int] | None = None  # configurations that a cascade ran, all of which are in the FLOPs
    kept: str | None = None  # `pack_bits` of the tokens alive after the last reduction; null: all, or merged
    values: dict[str, Any] | None = None  # what a benchmark's own aggregate is made of (`Task.score`)


@dataclass(frozen=True)
class TimingRecord(_Record):
    """One measured run of one setting. A null has its reason in `not_measured`."""

    setting_id: str
    method: str
    budget: float | None
    policy: str | None
    batch_size: int
    round: int
    num_text: int  # largest of the batch: what the batch is padded to
    num_visual: int
    num_new_tokens: int
    tower_ms: float | None
    scoring_ms: float | None  # part of tower_ms and prefill_ms that went into choosing tokens
    prefill_ms: float
    decode_ms_per_token: float | None
    end_to_end_ms: float
    cpu_prefill_ms: float | None  # processor time of all threads of this process
    peak_memory_bytes: int | None
    peak_memory_without_weights_bytes: int | None
    device: str
    not_measured: dict[str, str] = field(default_factory=dict)
    cpu_tower_ms: float | None = None
    cpu_decode_ms_per_token: float | None = None
    cpu_end_to_end_ms: float | None = None
    kv_bytes: int | None = None  # keys and values of the batch after the prefill, padding included
    modelled: bool = False  # True: the roofline's floor, not a measurement


@dataclass(frozen=True)
class Manifest(_Record):
    """What a finished cell is. `params` of an option that differs between samples is [smallest, largest]."""

    key: str
    method: str
    title: str
    params: dict[str, Any]
    trained: bool
    budget: float | None
    policy: str | None
    suite: str
    task: str
    metric: str
    num_samples: int
    num_failed: int
    status: str  # "ok" | "failed"
    error: str | None
    seconds: float  # of the process that finished the cell
    setting_id: str
    num_resumed: int = 0  # records found finished by an earlier process
    model: str | None = None  # checkpoint, where it is not the run's own
    configurations: list[dict[str, Any]] | None = None  # of a method that has several: the options of each
    aggregate: dict[str, Any] | None = None  # of a benchmark that has its own (`Task.aggregate`)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in ("ok", "failed"):
            raise RecordsError(f"cell {self.key}: status must be 'ok' or 'failed', got {self.status!r}")


def write_json_atomically(path: Path, data: Any) -> None:
    """The file holds either its old content or all of the new one."""
    write_bytes_atomically(path, (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """As `write_json_atomically`, for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private, and a run folder is to be shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The content of a JSON file; errors name it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist: {path.parent} is no run folder, or has not started") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordsError(f"{path} is not valid JSON ({error}); delete it to have it made again") from None


class JsonLines:
    """An append-only file of JSON objects, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _whole_lines(self) -> list[bytes]:
        """The lines that end in a newline; what follows the last newline was torn by a kill."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)

    def read(self) -> Iterator[dict[str, Any]]:
        """All whole records."""
        for number, line in enumerate(self._whole_lines(), start=1):
            try:
                yield json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise RecordsError(f"{self.path}, line {number}: not valid JSON ({error})") from None

    def cut(self, num_lines: int) -> None:
        """Keep the first `num_lines` whole records and drop the rest, a torn line included."""
        if self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(sum(map(len, self._whole_lines()[:num_lines])))

    def drop_torn_line(self) -> None:
        """To be called once before the first append of a process."""
        self.cut(len(self._whole_lines()))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records in one write and hand them to the operating system, which outlives this process."""
        dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
        text = "".join(dump(record) + "\n" for record in records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(text.encode("utf-8"))


class RunFolder:
    """A run folder, to write and to read.

    Args:
        path: the folder. It need not exist for writing; `RunFolder.open` insists on a `run.json`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.timings_file = JsonLines(self.path / "timings.jsonl")

    @classmethod
    def open(cls, path: str | os.PathLike) -> RunFolder:
        """A folder to read from.

        Raises:
            RecordsError: the path is no run folder, or one of a schema this code does not read.
        """
        folder = cls(path)
        version = folder.read_run().get("schema_version")
        if version != SCHEMA_VERSION:
            raise RecordsError(f"{folder.run_path} has schema {version}; this code reads {SCHEMA_VERSION}")
        return folder

    @property
    def run_path(self) -> Path:
        """What was run, on what: `evaluations.run_file`."""
        return self.path / "run.json"

    def write_run(self, run: dict[str, Any]) -> None:
        """Write run.json; `schema_version` is added."""
        write_json_atomically(self.run_path, {"schema_version": SCHEMA_VERSION, **run})

    def read_run(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            RecordsError: it is not there, or no JSON.
        """
        return read_json(self.run_path)

    def cell_path(self, key: str) -> Path:
        """The folder of a cell."""
        return self.path / "cells" / key

    def samples_file(self, key: str) -> JsonLines:
        """The records of a cell, one line a sample."""
        return JsonLines(self.cell_path(key) / "samples.jsonl")

    def write_manifest(self, manifest: Manifest) -> None:
        """Declare a cell done. Everything else about the cell must have been written before."""
        write_json_atomically(self.cell_path(manifest.key) / "manifest.json", manifest.to_dict())

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of a cell, or None if the cell is not done."""
        path = self.cell_path(key) / "manifest.json"
        return Manifest.from_dict(read_json(path)) if path.exists() else None

    def manifests(self) -> list[Manifest]:
        """All finished cells, failed ones included, in the order of the run (run.json `cells`), then by key."""
        keys = {path.parent.name for path in self.path.glob("cells/*/manifest.json")}
        run = self.read_run() if self.run_path.exists() else {}
        order = {key: place for place, key in enumerate(run.get("cells", []))}
        return [self.manifest(key) for key in sorted(keys, key=lambda key: (order.get(key, len(order)), key))]

    def samples(self, key: str) -> list[SampleRecord]:
        """The records of a cell, finished or not, in the order in which they were run."""
        return [SampleRecord.from_dict(record) for record in self.samples_file(key).read()]

    def timings(self) -> list[TimingRecord]:
        return [TimingRecord.from_dict(record) for record in self.timings_file.read()]

    def image_path(self, image_id: str) -> Path:
        """Where the image of an explorer sample is, or would be."""
        return self.path / "images" / f"{image_id}.png"

    def save_image(self, image_id: str, image: Any) -> None:
        """Store a PIL image once."""
        import io

        path = self.image_path(image_id)
        if not path.exists():
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            write_bytes_atomically(path, buffer.getvalue())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for writing. The lock dies with its process, so a killed run leaves none behind."""
        try:
            import fcntl
        except ImportError:  # no such lock on Windows; nothing else depends on it
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                message = f"another process is writing to {self.path}; wait for it or choose another --out"
                raise RecordsError(message) from None
            yield
