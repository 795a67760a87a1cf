"""Every kind of storage keeps the same promises."""

import math
import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from millpond.store.errors import InvalidInput, StorageFailed
from millpond.store.objects import check_conditional_create, open_storage


@pytest.fixture(params=["local", "memory", "ceph", "seaweedfs"])
def storage(request, tmp_path):
    if request.param == "local":
        return open_storage(tmp_path / "root")
    if request.param == "memory":
        return open_storage(f"memory://{uuid.uuid4().hex}")
    return request.getfixturevalue(request.param).storage(uuid.uuid4().hex)


def test_objects_are_put_read_listed_and_deleted(storage):
    storage.put("a/b", b"first")
    storage.put("a/b", b"0123456789", durable=False)
    assert storage.get("a/b") == b"0123456789"
    assert bytes(storage.get_range("a/b", 2, 3)) == b"234"
    assert bytes(storage.get_range("a/b", 8, 30)) == b"89"
    assert bytes(storage.get_range("a/b", 10, 5)) == bytes(storage.get_range("a/b", 99, 5)) == b""
    assert bytes(storage.get_tail("a/b", 4)) == b"6789"
    assert bytes(storage.get_tail("a/b", 40)) == b"0123456789"
    assert [bytes(piece) for piece in storage.get_ranges("a/b", [7, 0], [2, 1])] == [b"78", b"0"]
    target = bytearray(8)
    assert storage.read_into("a/b", 5, memoryview(target)) == 5
    assert bytes(target[:5]) == b"56789"
    targets = np.zeros((4, 3), np.uint8)
    assert storage.read_to_rows("a/b", 2, targets, np.array([3, 0])) == 6
    assert [bytes(row) for row in targets] == [b"567", bytes(3), bytes(3), b"234"]
    assert storage.read_to_rows("a/b", 7, targets, np.array([1, 2, 3])) == 3  # the object ends there
    assert bytes(targets[1]) == b"789"
    with pytest.raises(IndexError):
        storage.read_to_rows("a/b", 0, targets, np.array([0, 4]))
    order = np.random.default_rng(0).permutation(2500)
    many = np.zeros(2500, "<u2")
    storage.put("a/c/2", np.arange(2500, dtype="<u2").tobytes())
    assert storage.read_to_rows("a/c/2", 0, many.view(np.uint8).reshape(2500, 2), order) == 5000
    assert np.array_equal(many[order], np.arange(2500))
    assert storage.head("a/b").size == 10
    assert abs(storage.head("a/b").modified - storage.now()) < 30
    for name in ("a/c/2", "a/c/10", "a/.hidden", "ab"):
        storage.put(name, b"x")
    assert sorted(entry[:2] for entry in storage.list()) == [("a/b", 10), ("a/c/10", 1), ("a/c/2", 1), ("ab", 1)]
    assert [entry.path for entry in storage.list("a/c")] == ["a/c/10", "a/c/2"]
    assert [entry.path for entry in (storage / "a" / "c").list()] == ["10", "2"]
    assert (storage.folders(), storage.folders("a"), storage.folders("none")) == (["a"], ["c"], [])
    assert list(storage.list("none")) == []
    storage.copy("a/c/2", "d/e")
    assert storage.get("d/e") == b"x"
    storage.delete(["a/c/2", "a/c/10", "never"])
    storage.delete("never")
    assert storage.get("d/e") == b"x"
    storage.delete_tree("a")
    storage.delete_tree("never")
    assert sorted(entry.path for entry in storage.list()) == ["ab", "d/e"]
    assert storage.get_many(["ab", "never", "d/e"]) == [b"x", None, b"x"]


def test_what_is_missing_is_a_missing_file(storage):
    for call in (
        storage.get,
        storage.head,
        lambda path: storage.get_range(path, 0, 1),
        lambda path: storage.copy(path, "x"),
    ):
        with pytest.raises(FileNotFoundError):
            call("a/missing")
    assert not storage.exists("a/missing")


def test_of_many_creations_one_wins(storage):
    for number in range(3):
        with ThreadPoolExecutor(8) as pool:
            values = [b"%d" % racer for racer in range(8)]
            won = list(pool.map(lambda value, number=number: storage.create(f"race/{number}", value), values))
        assert sum(won) == 1
        assert storage.get(f"race/{number}") == values[won.index(True)]
    check_conditional_create(storage)


def test_a_stream_appears_whole_or_not_at_all(storage):
    pieces = np.random.default_rng(0).integers(0, 256, (5, 5 << 20), dtype=np.uint8)
    held = np.empty(5 << 20, np.uint8)
    with storage.stream_writer("s/whole") as writer:
        for piece in pieces:
            held[:] = piece
            writer.write(held.data)
            held[:] = 0  # its memory is the caller's again
        assert not storage.exists("s/whole")
    assert storage.get("s/whole") == pieces.tobytes()
    assert bytes(storage.get_range("s/whole", 3, 5 << 20)) == pieces.tobytes()[3 : 3 + (5 << 20)]
    target = bytearray(20 << 20)
    assert storage.read_into("s/whole", 7, memoryview(target)) == 20 << 20
    assert target == pieces.tobytes()[7 : 7 + (20 << 20)]
    longer = bytearray(45 << 20)
    assert storage.read_into("s/whole", 0, memoryview(longer)) == 25 << 20

    def broken():
        with storage.stream_writer("s/broken") as writer:
            writer.write(pieces[0].data)
            writer.write(pieces[1].data)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    with storage.stream_writer("s/empty"):
        pass
    assert [entry[:2] for entry in storage.list("s")] == [("s/empty", 0), ("s/whole", 25 << 20)]


def test_handles_are_equal_by_url_and_travel(storage):
    other = pickle.loads(pickle.dumps(storage / "x"))
    assert (other, other.url, other.name) == (storage / "x", f"{storage.url}/x", "x")
    storage.put("x/y", b"1")
    assert other.get("y") == b"1"


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("gs://bucket/x", {}, "unknown scheme"),
        ("s3:///x", {}, "names no bucket"),
        ("s3://bucket/../x", {}, "holds '..'"),
        ("memory://a/../b", {}, "holds '..'"),
        ("s3://bucket/x", {"keyy": "k"}, "storage option 'keyy' is not known; S3 takes key"),
        ("/tmp/x", {"key": "k"}, "means nothing"),
        ("s3://bucket/x", {"profile": "nobody"}, "AWS profile 'nobody' is in neither"),
    ],
)
def test_unusable_urls_and_options(url, options, message):
    with pytest.raises(InvalidInput, match=message):
        open_storage(url, **options)


def test_a_path_may_go_up(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/deep")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_storage("../lake").url == str(tmp_path / "lake")
    assert open_storage(tmp_path / "link" / ".." / "lake").url == str(tmp_path / "elsewhere" / "lake")  # as `ls` goes
    assert open_storage(tmp_path / "link").url == str(tmp_path / "link")


def test_s3_settings_come_as_s3fs_users_write_them(ceph, tmp_path, monkeypatch):
    ceph.storage("settings").put("x", b"1")
    url, endpoint = f"s3://{ceph.bucket}/settings", ceph.environment["AWS_ENDPOINT_URL"]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    keys = {"key": ceph.environment["AWS_ACCESS_KEY_ID"], "secret": ceph.environment["AWS_SECRET_ACCESS_KEY"]}
    assert open_storage(url, **keys, endpoint_url=endpoint).get("x") == b"1"
    assert (
        open_storage(url, **keys, client_kwargs={"endpoint_url": endpoint, "region_name": "us-east-1"}).get("x") == b"1"
    )
    with pytest.raises(StorageFailed, match="refuses these credentials"):
        open_storage(url, key=keys["key"], secret="wrong", endpoint_url=endpoint).get("x")
    with pytest.raises(StorageFailed, match="no bucket 'nowhere'"):
        open_storage("s3://nowhere/x", **keys, endpoint_url=endpoint).put("x", b"")
    with monkeypatch.context() as patch:
        for name, value in ceph.environment.items():
            patch.setenv(name, value)
        assert open_storage(url).get("x") == b"1"
    (tmp_path / "credentials").write_text(
        f"[lake]\naws_access_key_id = {keys['key']}\naws_secret_access_key = {keys['secret']}\n"
    )
    (tmp_path / "config").write_text(f"[profile lake]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert open_storage(url, profile="lake").get("x") == b"1"
    monkeypatch.setenv("AWS_PROFILE", "lake")
    assert open_storage(url).get("x") == b"1"


@pytest.mark.parametrize("kind", ["ceph", "seaweedfs"])
def test_uploads_that_nobody_will_finish_are_aborted(request, kind):
    from botocore.session import Session

    server = request.getfixturevalue(kind)
    storage = server.storage(f"{uuid.uuid4().hex}/run")
    other = server.storage(f"{uuid.uuid4().hex}/run")
    options = server.options()
    client = Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id=options["key"],
        aws_secret_access_key=options["secret"],
    )

    def begin(run, name):
        key = f"{run.url.removeprefix('s3://lakes/')}/{name}"
        place = {"Bucket": "lakes", "Key": key}
        place["UploadId"] = client.create_multipart_upload(**place)["UploadId"]
        return place, client.upload_part(**place, PartNumber=1, Body=b"x" * (5 << 20))["ETag"]

    def left(run):
        prefix = run.url.removeprefix("s3://lakes/") + "/"
        found = client.list_multipart_uploads(Bucket="lakes", Prefix=prefix).get("Uploads", [])
        return [upload["Key"].removeprefix(prefix) for upload in found]

    begin(storage, "segments/a/hook/c/0/0")
    kept, tag = begin(other, "segments/a/hook/c/0/0")
    storage.sweep("", storage.now() - 60)
    storage.sweep("segments", math.inf)
    assert left(storage) == left(other) == ["segments/a/hook/c/0/0"]
    storage.sweep("", math.inf)
    assert (left(storage), left(other)) == ([], ["segments/a/hook/c/0/0"])
    client.complete_multipart_upload(**kept, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": tag}]})
    assert other.head("segments/a/hook/c/0/0").size == 5 << 20
