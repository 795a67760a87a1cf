"""A reader and a writer of open runs in a folder, made from docs/format.md alone: it must not import Millpond."""

import json
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd

KINDS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def checked(path, wanted):
    """The bytes of an object with the size and crc32c that a document gives."""
    data = Path(path).read_bytes()
    assert [len(data), google_crc32c.value(data)] == list(wanted), path
    return data


def read_document(path):
    data = Path(path).read_bytes()
    at = data.rindex(b'"crc32c": "') + len(b'"crc32c": "')
    found = json.loads(data)
    assert int(found.pop("crc32c"), 16) == google_crc32c.value(data[:at] + b"00000000" + data[at + 8 :]), path
    return found


def encode_document(members):
    text = json.dumps({**members, "crc32c": "00000000"})
    return text.replace('"crc32c": "00000000"', f'"crc32c": "{google_crc32c.value(text.encode()):08x}"').encode()


def read_array(folder, rows, kind, columns, shard_rows, shards):
    """The rows of an array without a codec; its shards have these sizes and checksums."""
    found = [np.empty((0, columns), kind)]
    for number, wanted in enumerate(shards):
        data = checked(folder / f"c/{number}/0" if columns > 1 else folder / f"c/{number}", wanted)
        count = min(rows - number * shard_rows, shard_rows)
        found.append(np.frombuffer(data, kind, count * columns).reshape(count, columns))
    return np.concatenate(found)


def read_open_run(run):
    """The visible prompts, in order, and of each hook their rows as they are stored."""
    spec = read_document(run / "run.json")
    assert (spec["format"], spec["version"]) == ("millpond-run", 2)
    assert not (run / "manifest.json").exists()
    commits = sorted((run / "commits").glob("[!.]*.json"))
    versions = sorted((run / "manifests").glob("[!.]*.json")) if (run / "manifests").exists() else []
    parts, tables = [], []
    if versions:
        version = read_document(versions[0])
        assert version["number"] == 2**64 - 1 - int(versions[0].stem, 16)
        for page in version["pages"]:
            for suffix, wanted in page["files"].items():
                checked(run / f"{page['path']}{suffix}", wanted)
            segments = pd.read_parquet(run / f"{page['path']}.segments.parquet")
            for _, row in segments.iterrows():
                arrays = {
                    name.removeprefix("shards:"): np.array(value).reshape(-1, 2).tolist()
                    for name, value in row.items()
                    if name.startswith("shards:")
                }
                parts.append((f"segments/{row['id']}", row["rows"], arrays, row.get("dropped", False)))
            tables.append(pd.read_parquet(run / f"{page['path']}.prompts.parquet"))
    held = {Path(path).name for path, *_ in parts}
    for commit in commits:
        if commit.stat().st_size and commit.stem not in held:
            part = read_document(commit)
            checked(run / part["path"] / "prompts.parquet", part["prompt_table"])
            arrays = {name: array["shards"] for name, array in part["arrays"].items()}
            parts.append((part["path"], part["rows"], arrays, False))
            tables.append(pd.read_parquet(run / part["path"] / "prompts.parquet"))
    prompts = pd.concat(tables, ignore_index=True)
    visible = prompts["visible"].to_numpy(object) if "visible" in prompts else np.full(len(prompts), None, object)
    first = ~prompts["id"].duplicated().to_numpy()
    shown = np.array(
        [one if known is None or known != known else known for known, one in zip(visible, first, strict=True)]
    )
    keep = np.repeat(shown.astype(bool), prompts["n_rows"])
    rows = {}
    for hook in spec["hooks"]:
        read = [
            np.zeros((count, spec["d_model"]), KINDS[spec["dtype"]])
            if dropped
            else read_array(
                run / path / hook, count, KINDS[spec["dtype"]], spec["d_model"], spec["shard_rows"], arrays[hook]
            )
            for path, count, arrays, dropped in parts
        ]
        rows[hook] = np.concatenate(read)[keep]
    return prompts["id"][shown.astype(bool)].tolist(), rows


def write_array(folder, values, chunk, shard, attributes, names):
    """An array without a codec; returns what a commit says of it."""
    shape, kind = list(values.shape), values.dtype
    row_bytes = kind.itemsize * int(np.prod(shape[1:], dtype=int))
    shards = []
    for number in range(-(-shape[0] // shard)):
        rows = values[number * shard : (number + 1) * shard]
        used = -(-len(rows) // chunk)
        size = chunk * row_bytes
        index = [(n * size, size) if n < used else (2**64 - 1, 2**64 - 1) for n in range(shard // chunk)]
        packed = b"".join(struct.pack("<QQ", *entry) for entry in index)
        body = rows.tobytes() + bytes(used * size - len(rows) * row_bytes)
        data = body + packed + struct.pack("<I", google_crc32c.value(packed))
        path = folder / "c" / str(number) / "0" if len(shape) > 1 else folder / "c" / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        shards.append([len(data), google_crc32c.value(data)])
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [chunk, *shape[1:]],
        "codecs": [little],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": names,
        "attributes": attributes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_text(json.dumps(metadata))
    return {"rows": shape[0], "shards": shards}, metadata


def hidden_state(hook):
    layer, _, name = hook.removeprefix("blocks.").partition(".")
    return {"hook_resid_pre": int(layer), "hook_resid_post": int(layer) + 1}.get(name)


def commit_segment(run, segment, prompts, rows, position, token_id):
    """Make `prompts`, a table, visible with the rows of each hook as they are stored."""
    spec = read_document(run / "run.json")
    group = run / "segments" / segment
    prompt = np.repeat(np.arange(len(prompts), dtype=np.int32), prompts["n_rows"])
    index = {"prompt": prompt, "position": position.astype(np.int32), "token_id": token_id.astype(np.int32)}
    arrays, metadata = {}, {}
    for name, values in {**rows, **index}.items():
        given = {}, ["row"]
        if name in rows:
            about = {
                "millpond:dtype": spec["dtype"],
                "millpond:hook": name,
                "millpond:hidden_state": hidden_state(name),
            }
            given = about, ["row", "d_model"]
        sizes = spec["chunk_rows"], spec["shard_rows"]
        arrays[name], metadata[name] = write_array(group / name, values, *sizes, *given)
    consolidated = {"kind": "inline", "must_understand": False, "metadata": metadata}
    about = {"zarr_format": 3, "node_type": "group", "attributes": {"millpond:run": spec["name"]}}
    (group / "zarr.json").write_text(json.dumps({**about, "consolidated_metadata": consolidated}))
    prompts.to_parquet(group / "prompts.parquet", index=False)
    table = (group / "prompts.parquet").read_bytes()
    part = {
        "path": f"segments/{segment}",
        "rows": len(prompt),
        "prompts": len(prompts),
        "arrays": arrays,
        "prompt_table": [len(table), google_crc32c.value(table)],
        "statistics": None,
    }
    (run / "commits").mkdir(exist_ok=True)
    with (run / "commits" / f"{segment}.json").open("xb") as file:  # created, or an error
        file.write(encode_document(part))
