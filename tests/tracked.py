"""What a run has told trackers, read from their own files."""

import json
import struct

import pytest


def rows_in_wandb(folder):
    """What a run's offline record in wandb holds, in the order in which it was logged."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process writes the file, and is waited for
    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records_of(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def records_of(log, block=32_768):
    """Of a log as LevelDB writes it, after wandb's 7 bytes: a record that no block holds is in several pieces."""
    at, whole = 7, b""
    while at < len(log):
        if block - at % block < 7:  # no room for a head: zeros
            at += block - at % block
            continue
        _, size, piece = struct.unpack_from("<IHB", log, at)
        whole += log[at + 7 : at + 7 + size]
        at += 7 + size
        if piece in (1, 4):  # the only one, or the last
            yield whole
            whole = b""


def scalars(folder):
    """(tag, step, value) and texts of all event files of a folder, in order: TensorFlow's records, without reading sums.

    As TensorBoard shows them: a file that begins at a step takes the place of what was logged of it and after it.
    """
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    numbers, texts = [], {}
    for file in sorted(folder.rglob("events.out*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack("<Q", content[at : at + 8])
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == event_pb2.SessionLog.START:
                numbers = [number for number in numbers if number[1] < event.step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    numbers.append((value.tag, event.step, value.simple_value))
                elif value.tensor.string_val:
                    texts[value.tag, event.step] = value.tensor.string_val[0].decode()
    return numbers, texts
