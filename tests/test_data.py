"""The way from an archive, or a folder of one's own, to augmented batches."""

import hashlib
import io
import tarfile
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import make_split, own_folder, photograph
from PIL import Image
from torchvision.transforms import functional as tv

import kd_utils as kd


# ── Archives ──────────────────────────────────────────────────────────────
def archive_of(*names):
    """A .tgz with an empty file under each name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


IMAGES = [f"tiny/{place}/x.JPEG" for place in ("train/a", "train/b", "val/a", "val/b")]
GOOD = archive_of(*IMAGES)
CUT = GOOD[:-20]


@pytest.fixture
def serve(monkeypatch):
    """Makes the internet give this archive, whose MD5 is the known one."""

    def start(archive, problem=None):
        md5, urls = hashlib.md5(archive).hexdigest(), []

        def urlopen(request, *_, **__):
            urls.append(request.full_url)
            answer = Mock(wraps=io.BytesIO(problem if problem else archive))
            answer.__enter__, answer.__exit__ = lambda _: answer, lambda *_: None
            answer.length, answer.url = len(archive), request.full_url
            return answer

        monkeypatch.setitem(kd.DATASETS, "tiny", (md5, (2, 2)))
        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        return urls

    return start


def test_archive_is_downloaded_when_its_folder_is_not_there(tmp_path, serve):
    urls = serve(GOOD)
    for _ in range(2):  # the second time, what is there is used
        folder = kd.download_dataset("tiny", tmp_path, "https://x")
    assert urls.count("https://x/tiny.tgz") >= 1
    count = len(urls)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    (folder / "val/b/x.JPEG").unlink()
    with pytest.raises(ValueError, match=r"tiny holds \(2, 1\) images, not \(2, 2\)"):
        kd.download_dataset("tiny", tmp_path)
    assert len(urls) == count


def test_archive_that_cannot_be_had_or_is_hostile_leaves_nothing(tmp_path, serve):
    evil, small = archive_of(*IMAGES, "../../out"), archive_of(*IMAGES[:3])
    refused = {(GOOD, CUT): (ConnectionError, "https://x/tiny.tgz cannot be had")}
    refused[evil, None] = (tarfile.FilterError, "out")
    for (archive, problem), (error, told) in refused.items():
        serve(archive, problem)
        with pytest.raises(error, match=told):
            kd.download_dataset("tiny", tmp_path / "root", "https://x")
        assert [path.name for path in tmp_path.rglob("*")] == ["root"]
    serve(small)
    with pytest.raises(ValueError, match=r"holds \(2, 1\) images, not \(2, 2\)"):
        kd.download_dataset("tiny", tmp_path / "root", "https://x")


# ── A folder of one's own ─────────────────────────────────────────────────
def test_own_folder_keeps_its_names_and_what_is_no_image_is_left_out(tmp_path, capsys):
    images = {
        "tabby, tabby cat": photograph(30, "L"),
        "n03888257": photograph(60, "CMYK"),
        "n01440764": photograph(90),
    }
    folder = own_folder(tmp_path / "demo", images)
    train = folder / "train"
    (train / "n03888257/ILSVRC2012_val_7.JPEG").write_bytes(photograph(120))
    (train / ".ipynb_checkpoints").mkdir()
    hidden = ".ipynb_checkpoints/x.jpg", "n01440764/._one.jpg", "n01440764/.DS_Store"
    for name in (*hidden, "notes.txt", "n01440764/notes.txt", "n03888257/film.mp4"):
        (train / name).write_bytes(b"nothing")
    assert kd.download_dataset(str(folder)) == folder
    found = kd.load_split(folder, "train", 16)
    assert found.classes == ("tench", "parachute", "tabby, tabby cat")
    assert found.targets.tolist() == [0, 1, 1, 2]
    assert found.images[:, 0, 8, 8].tolist() == pytest.approx([90, 60, 120, 30], abs=3)
    assert found.never_seen.tolist() == [False, False, True, False]
    assert f"{train}: 2 files" in capsys.readouterr().out


def test_folders_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'imagewolf'.*imagewoof2-160"):
        kd.download_dataset("imagewolf")
    deep = own_folder(tmp_path / "deep", {"pets": photograph()})
    with pytest.raises(ValueError, match=r"two or more .*\['pets'\]"):
        kd.load_split(deep, "train", 16)
    (deep / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train: no image in \['empty'\]"):
        kd.load_split(deep, "train", 16)
    (deep / "train" / "empty" / "broken.jpg").write_bytes(photograph()[:300])
    with pytest.raises(ValueError, match=r"cannot read the image .*broken\.jpg"):
        kd.load_split(deep, "train", 16)


def test_images_are_upright_cut_at_the_centre_and_put_on_white(tmp_path):
    def read(pixels, name="x.png", **options):
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(tmp_path / name, **options)
        return kd.read_image(tmp_path / name, 32).numpy()

    stripes = np.zeros((64, 128, 3))  # red, green in the centre, blue
    stripes[:, :32, 0] = stripes[:, 32:96, 1] = stripes[:, 96:, 2] = 255
    assert read(stripes)[:, :, 3:-3].mean((1, 2)).tolist() == [0, 255, 0]

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left of the file is the top
    found = read(stripes[:, :64], "x.jpg", exif=exif).mean((2,))
    assert found[0, :14].min() > 240 and found[1, 18:].min() > 240

    half = read(np.full((32, 32, 4), (200, 0, 0, 128)))  # half transparent
    assert half[:, 9, 9].tolist() == pytest.approx([227, 127, 127], abs=1)
    black = Image.new("P", (32, 32))  # whose first colour is transparent
    black.save(tmp_path / "x.gif", transparency=0)
    assert (kd.read_image(tmp_path / "x.gif", 32) == 255).all()
    steps = np.linspace(0, 1, 32)[:, None].repeat(32, axis=1)  # from dark to bright
    expected = torch.tensor(255 * steps[:, 5]).round()
    deep = {"x.png": (4095 * steps).astype(np.uint16)}  # 12 bits in 16
    deep |= {
        "x.tif": steps.astype(np.float32),
        "y.tif": (steps * 2000 - 999).astype(np.int32),
    }
    for name, pixels in deep.items():
        Image.fromarray(pixels).save(tmp_path / name)
        found = kd.read_image(tmp_path / name, 32)
        assert (found[:, :, 5].float() - expected).abs().max() <= 1, name
    steps[3, 3] = np.nan
    Image.fromarray(steps.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.tif.*NaN"):
        kd.read_image(tmp_path / "x.tif", 32)
    board = np.indices((64, 64)).sum(0) % 2 * 255  # halved: grey, not black or white
    found = read(board)
    assert found.min() > 100 and found.max() < 155


# ── Batches ───────────────────────────────────────────────────────────────
def test_epoch_shows_whole_batches_of_augmented_images_and_their_labels(settings):
    split, callers = make_split(50), torch.get_rng_state()
    settings = replace(settings, stream_seed=5, min_crop=0.6)
    with kd.seeded(5, 1):
        order, views = torch.randperm(50), kd.draw_views(50, 0.6)
    expected = kd.normalise(kd.augment(split.images[order], views.to(kd.DEVICE)))
    batches = list(kd.augmented_batches(split, settings, epoch=1))
    images, targets = map(torch.cat, zip(*batches, strict=True))
    assert len(images) == 48 and torch.equal(torch.get_rng_state(), callers)
    assert torch.allclose(images, expected[:48], atol=1e-4)
    assert torch.equal(targets, split.targets[order[:48]])


def test_views_and_their_normalisation_are_torchvisions():
    images = make_split(2).images
    whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    mirrored = whole * torch.tensor([-1, 1, 1])
    found = kd.augment(images, torch.stack([whole, mirrored]).to(kd.DEVICE))
    assert torch.allclose(found[0], images[0].float(), atol=1e-2)
    assert torch.allclose(found[1], tv.hflip(images[1]).float(), atol=1e-2)

    quarter = torch.tensor([[0.5, 0, 0.5], [0, 0.5, -0.5]])  # right, at the top
    corner = tv.resize(images[:1, :, :16, 16:].float(), [32, 32], antialias=False)
    found = kd.augment(images[:1], quarter[None].to(kd.DEVICE))
    assert torch.allclose(found[..., :30, 2:], corner[..., :30, 2:], atol=1e-2)

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    plain = tv.normalize(images / 255, mean, std)
    assert torch.allclose(kd.normalise(images), plain, atol=1e-5)


def test_views_are_drawn_from_their_whole_range():
    with kd.seeded(0):
        views = kd.draw_views(4000, min_crop=0.35)
    assert views.shape == (4000, 2, 3) and not views[:, [0, 1], [1, 0]].any()
    width, height = views[:, 0, 0].abs(), views[:, 1, 1]
    area, aspect = width * height, width / height
    assert 0.33 < area.min() < 0.37 and area.max() > 0.95 and 0.6 < area.mean() < 0.68
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35
    assert 0.47 < (views[:, 0, 0] < 0).float().mean() < 0.53
    inside = (width < 0.95) & (height < 0.95)
    places = (views[:, :, 2] / (1 - torch.stack([width, height], 1)))[inside].T
    for place in places:  # −1 … 1: from edge to edge
        assert place.abs().max() < 1.001 and place.mean().abs() < 0.05
        assert place.std() > 0.5
    drawn = torch.stack([*places, area[inside], views[inside, 0, 0]])
    related = torch.corrcoef(drawn) - torch.eye(4)
    assert related.abs().max() < 0.1  # each is drawn for itself
