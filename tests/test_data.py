"""The way from an archive to augmented batches, and what happens when the archive is bad."""

import hashlib
import http.server
import io
import tarfile
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import make_split
from PIL import Image
from torchvision.transforms.functional import resize

import kd_utils as kd


def photograph(mode="RGB", size=(40, 50)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def archive_of(members):
    """A .tgz from {name: bytes or TarInfo}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            body = b"" if content is info else content
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


IMAGES = {f"tiny/{split}/{name}/x.JPEG": photograph() for split in ("train", "val") for name in "ab"}
GOOD = archive_of(IMAGES)


@contextmanager
def serving(*answers):
    """A loopback server that gives these bodies in turn, the last one for ever; yields its address."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = answers[min(len(asked), len(answers) - 1)]
            if "Method" not in self.headers:  # torchvision first asks where the address leads
                asked.append(self.path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    md5 = hashlib.md5(GOOD).hexdigest()
    monkeypatch.setitem(kd.DATASETS, "tiny", (md5, {"train": 2, "val": 2}, "ant, bee"))


def test_archive_is_downloaded_once(tmp_path):
    with serving(GOOD) as (url, asked):
        folder = kd.download_dataset("tiny", tmp_path, url)
        assert kd.download_dataset("tiny", tmp_path, url) == folder == tmp_path / "tiny"
    assert asked == ["/tiny.tgz"] and [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("bad", [GOOD[:-20], GOOD[:99] + b"?" + GOOD[100:]], ids=["cut", "changed"])
def test_bad_archive_is_fetched_again(tmp_path, bad):
    with serving(bad, GOOD) as (url, asked):
        assert kd.download_dataset("tiny", tmp_path, url).is_dir()
    assert len(asked) == 2


def test_archive_that_stays_bad_is_refused_with_both_checksums(tmp_path):
    with serving(GOOD[:-20]) as (url, _), pytest.raises(ConnectionError) as error:
        kd.download_dataset("tiny", tmp_path, url)
    for md5 in (hashlib.md5(GOOD).hexdigest(), hashlib.md5(GOOD[:-20]).hexdigest()):
        assert md5 in str(error.value)
    assert not list(tmp_path.iterdir())


def test_missing_archive_and_unknown_dataset_are_refused(tmp_path):
    with serving(b"") as (url, _), pytest.raises(ConnectionError, match="404.*got nothing"):
        kd.download_dataset("tiny", tmp_path, url)
    with pytest.raises(ValueError, match="'imagewolf'.*imagewoof2-160"):
        kd.download_dataset("imagewolf")


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("name, member", [
    ("../escaped", b"out"),
    ("tiny/link", link("tiny/link", "../../outside", tarfile.SYMTYPE)),
    ("tiny/hard", link("tiny/hard", "../outside", tarfile.LNKTYPE)),
    ("tiny/device", link("tiny/device", "", tarfile.CHRTYPE)),
    ("tiny/pipe", link("tiny/pipe", "", tarfile.FIFOTYPE)),
])  # fmt: skip
def test_members_that_escape_are_refused(tmp_path, name, member):
    evil = archive_of({**IMAGES, name: member})
    with serving(evil) as (url, _), pytest.raises(tarfile.FilterError):
        kd.download_dataset("tiny", tmp_path / "root", url, md5=hashlib.md5(evil).hexdigest())
    assert [path.name for path in tmp_path.rglob("*")] == ["root"]


def test_half_unpacked_folder_is_set_aside_and_replaced(tmp_path, capsys):
    with serving(GOOD) as (url, _):
        folder = kd.download_dataset("tiny", tmp_path, url)
        (folder / "val" / "b" / "x.JPEG").unlink()
        kd.download_dataset("tiny", tmp_path, url)
    assert kd.count_images(folder) == {"train": 2, "val": 2}
    assert "'val': 1} images instead of" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2


def test_archive_with_too_few_images_is_refused(tmp_path):
    small = archive_of(dict(list(IMAGES.items())[:3]))
    with serving(small) as (url, _), pytest.raises(ValueError, match="instead of"):
        kd.download_dataset("tiny", tmp_path, url, md5=hashlib.md5(small).hexdigest())


def test_two_notebooks_may_draw_the_demo_at_once(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        folders = list(pool.map(kd.download_dataset, ["demo"] * 2, [tmp_path] * 2))
    assert folders == [tmp_path / "demo"] * 2 and len(list(tmp_path.iterdir())) == 1
    val = kd.load_split(folders[0], "val", 32)
    assert val.images.shape == (100, 3, 32, 32) and val.images.dtype is torch.uint8
    assert val.classes[5] == "hollow triangle" and val.targets.bincount().tolist() == [10] * 10
    assert int(val.never_seen.sum()) == 40


def test_images_of_all_modes_are_decoded_in_the_order_of_the_folders(tmp_path):
    for name, mode in (("b", "L"), ("a", "CMYK")):
        path = tmp_path / "tiny" / "train" / name / "ILSVRC2012_val_1.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(photograph(mode))
    found = kd.load_split(tmp_path / "tiny", "train", 16)
    assert found.images.shape == (2, 3, 16, 16) and found.targets.tolist() == [0, 1]
    assert found.classes == ["ant", "bee"] and found.never_seen.all()


def test_bad_images_and_folders_are_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="a"):
        kd.load_split(tmp_path, "train", 16)
    (tmp_path / "train" / "a" / "broken.JPEG").write_bytes(photograph()[:300])
    with pytest.raises(ValueError, match="broken.JPEG"):
        kd.load_split(tmp_path, "train", 16)


def test_epoch_is_a_function_of_seed_and_epoch(settings, split):
    def epoch(number, first=0):
        return [images for images, _ in kd.augmented_batches(split, settings, number, first)]

    torch.manual_seed(1)
    one = epoch(0)
    torch.manual_seed(2)
    again, later, other = epoch(0), epoch(0, first=2), epoch(1)
    assert len(one) == 3 and all(torch.equal(a, b) for a, b in zip(one, again))
    assert torch.equal(later[0], one[2]) and not torch.equal(other[0], one[0])


def test_epoch_shows_every_image_once(settings, split):
    split.images = split.targets.new_zeros(48, 3, 8, 8) + torch.arange(48).view(48, 1, 1, 1)
    batches = list(kd.augmented_batches(split, settings, 0))
    seen = torch.cat([(images * kd.STD + kd.MEAN)[:, 0, 0, 0] for images, _ in batches]).round()
    assert sorted(seen.int().tolist()) == list(range(48))
    targets = torch.cat([targets for _, targets in batches])
    assert torch.equal(targets, split.targets[seen.long()])


def test_views_crop_and_mirror_as_torchvision_does():
    images = make_split(2).images
    whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    mirrored, quarter = whole * torch.tensor([-1, 1, 1]), torch.tensor([[0.5, 0, -0.5], [0, 0.5, -0.5]])
    assert torch.allclose(kd.augment(images, torch.stack([whole, mirrored]))[0], images[0].float(), atol=1e-3)
    assert torch.allclose(kd.augment(images, torch.stack([whole, mirrored]))[1], images[1].flip(2).float(), atol=1e-3)
    corner = resize(images[:1, :, :16, :16].float(), [32, 32], antialias=False)
    found = kd.augment(images[:1], quarter[None])
    assert torch.allclose(found[..., :30, :30], corner[..., :30, :30], atol=1e-3)


def test_views_keep_to_their_range():
    torch.manual_seed(0)
    views = kd.draw_views(2000, min_crop=0.35)
    width, height = views[:, 0, 0].abs(), views[:, 1, 1]
    assert 0.3 < (width * height).min() < 0.4 and (width * height).max() > 0.95
    assert (views[:, 0, 2].abs() <= 1 - width + 1e-6).all() and (views[:, 1, 2].abs() <= 1 - height + 1e-6).all()
    assert 0.45 < (views[:, 0, 0] < 0).float().mean() < 0.55
