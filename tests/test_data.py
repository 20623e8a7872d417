"""The way from an archive, or a folder of one's own, to augmented batches."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from conftest import make_split
from PIL import Image
from torchvision.transforms import functional as tv

import kd_utils as kd


def photograph(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


# ── Archives ──────────────────────────────────────────────────────────────
def archive_of(places, *specials):
    """A .tgz with a photograph in each place, and other members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for place in places:
            info = tarfile.TarInfo(f"tiny/{place}/x.JPEG")
            info.size = len(photograph())
            tar.addfile(info, io.BytesIO(photograph()))
        for info in specials:
            tar.addfile(info)
    return buffer.getvalue()


PLACES = ("train/a", "train/b", "val/a", "val/b")
GOOD = archive_of(PLACES)
WRONG = GOOD[:99] + b"?" + GOOD[100:]


@pytest.fixture
def serve(monkeypatch):
    """Makes the internet answer so, the last answer for ever; lists what is asked.
    The dataset `tiny` is the first answer's, or that of `archive`."""

    def start(*answers, archive=GOOD):
        asked, left = [], iter(answers)

        def urlopen(url, timeout):
            asked.append(url)
            assert timeout == 0.01
            answer = next(left, answers[-1])
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        monkeypatch.setitem(
            kd.DATASETS, "tiny", (hashlib.md5(archive).hexdigest(), (2, 2))
        )
        monkeypatch.setattr(kd, "DOWNLOAD_SECONDS", 0.01)
        monkeypatch.setattr(kd, "urlopen", urlopen)
        return asked

    return start


def test_archive_is_downloaded_until_it_is_whole_and_then_used(tmp_path, serve):
    asked = serve(GOOD[:-20], WRONG, GOOD)
    folder = kd.download_dataset("tiny", tmp_path, "https://x")
    assert kd.download_dataset("tiny", tmp_path) == folder == tmp_path / "tiny"
    assert asked == ["https://x/tiny.tgz"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("answer", [GOOD[:-20], TimeoutError("no answer")])
def test_archive_that_cannot_be_had_is_given_up(tmp_path, serve, answer):
    (tmp_path / "tiny/train/a").mkdir(parents=True)
    (tmp_path / "tiny/train/a/x.JPEG").write_bytes(photograph())
    asked = serve(answer)
    with pytest.raises(ConnectionError) as error:
        kd.download_dataset("tiny", tmp_path, "https://x")
    reason = "no answer"
    if isinstance(answer, bytes):
        reason = f"MD5 {hashlib.md5(answer).hexdigest()}, not {kd.DATASETS['tiny'][0]}"
    for told in (tmp_path / "tiny", "(1, 0)", "(2, 2)", "https://x/tiny.tgz", reason):
        assert str(told) in str(error.value)
    assert len(asked) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


SPECIAL = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, *SPECIAL])
def test_members_that_escape_are_refused(tmp_path, serve, kind):
    member = tarfile.TarInfo("../out" if kind == tarfile.REGTYPE else "tiny/special")
    member.type, member.linkname = kind, "../../outside"
    evil = archive_of(PLACES, member)
    serve(evil, archive=evil)
    with pytest.raises(tarfile.FilterError):
        kd.download_dataset("tiny", tmp_path / "root")
    assert [path.name for path in tmp_path.rglob("*")] == ["root"]


def test_folder_or_archive_with_too_few_images_is_not_used(tmp_path, serve, capsys):
    small = archive_of(PLACES[:3])
    serve(small, archive=small)
    with pytest.raises(ValueError, match=r"tiny\.tgz.*\(2, 1\).*\(2, 2\)"):
        kd.download_dataset("tiny", tmp_path)
    serve(GOOD)
    folder = kd.download_dataset("tiny", tmp_path)
    (folder / "val" / "b" / "x.JPEG").unlink()
    kd.download_dataset("tiny", tmp_path)
    assert kd.count_images(folder) == (2, 2)
    assert kd.count_images(tmp_path / "tiny.1") == (2, 1)
    assert "tiny holds (2, 1) images" in capsys.readouterr().out


def test_demo_is_drawn_like_the_real_datasets(tmp_path):
    folder = kd.download_dataset("demo", tmp_path)
    val = kd.load_split(folder, "val", 32)
    assert val.images.shape == (100, 3, 32, 32) and val.images.dtype is torch.uint8
    assert val.classes[0] == "gold 3-gon" and (val.targets.bincount() == 10).all()
    assert val.never_seen.sum() == 40 and val.images.device.type == kd.DEVICE.type


# ── A folder of one's own ─────────────────────────────────────────────────
def own_folder(root, **classes):
    """`root` with train and val, each with these classes of one image."""
    for split in ("train", "val"):
        for name, content in classes.items():
            path = root / split / name / "one.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
    return root


def test_folder_of_ones_own_keeps_its_names_and_order(tmp_path):
    modes = {"tabby, tabby cat": "L", "n03888257": "CMYK", "n01440764": "RGB"}
    images = {name: photograph(mode) for name, mode in modes.items()}
    folder = own_folder(tmp_path / "demo", **images)
    (folder / "train/n03888257/ILSVRC2012_val_7.JPEG").write_bytes(photograph())
    assert kd.download_dataset(str(folder)) == folder
    found = kd.load_split(folder, "train", 16)
    assert found.classes == ("tench", "parachute", "tabby, tabby cat")
    assert found.targets.tolist() == [0, 1, 1, 2]
    assert found.never_seen.tolist() == [False, True, False, False]


def test_what_is_hidden_or_unknown_is_left_out(tmp_path, capsys):
    folder = own_folder(tmp_path / "pets", cat=photograph(), dog=photograph())
    hidden = (".ipynb_checkpoints/x.jpg", "cat/._one.jpg", "cat/.DS_Store", "x.txt")
    for name in (*hidden, "cat/notes.txt", "dog/film.mp4"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_bytes(b"nothing")
    found = kd.load_split(folder, "train", 16)
    assert found.classes == ("cat", "dog") and len(found) == 2
    assert f"{folder / 'train'}: 2 files" in capsys.readouterr().out


def test_folders_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'imagewolf'.*imagewoof2-160"):
        kd.download_dataset("imagewolf")
    deep = own_folder(tmp_path / "deep", pets=photograph())
    with pytest.raises(ValueError, match=r"two or more .*\['pets'\]"):
        kd.load_split(deep, "train", 16)
    (deep / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train: no image in \['empty'\]"):
        kd.load_split(deep, "train", 16)
    (deep / "train" / "empty" / "broken.jpg").write_bytes(photograph()[:300])
    with pytest.raises(ValueError, match=r"cannot read the image .*broken\.jpg"):
        kd.load_split(deep, "train", 16)


def test_images_are_upright_cut_at_the_centre_and_put_on_white(tmp_path):
    def read(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return kd.read_image(tmp_path / name, 32)

    stripes = np.zeros((64, 128, 3), dtype=np.uint8)  # red, green in the centre, blue
    stripes[:, :32, 0] = stripes[:, 32:96, 1] = stripes[:, 96:, 2] = 255
    found = read(Image.fromarray(stripes))
    assert found[:, :, 3:-3].float().mean((1, 2)).tolist() == [0, 255, 0]

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left of the file is the top
    halves = np.zeros((32, 32, 3), dtype=np.uint8)
    halves[:, :16] = 255
    found = read(Image.fromarray(halves), "x.jpg", exif=exif).float()
    assert found[:, :14].mean() > 250 and found[:, 18:].mean() < 5

    assert (read(Image.new("RGBA", (32, 32), (200, 0, 0, 0))) == 255).all()
    assert (read(Image.new("LA", (32, 32), (9, 0))) == 255).all()
    palette = Image.new("RGB", (32, 32), (200, 0, 0)).quantize(2)
    assert (read(palette, transparency=palette.getpixel((0, 0))) == 255).all()
    half = read(Image.new("RGBA", (32, 32), (200, 0, 0, 128)))
    assert half[:, 9, 9].tolist() == pytest.approx([227, 127, 127], abs=1)
    grey = Image.fromarray(np.full((32, 32), 32896, dtype=np.uint16))
    assert (read(grey) == 128).all()


# ── Batches ───────────────────────────────────────────────────────────────
def test_normalise_is_torchvisions():
    images = make_split(4).images
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = tv.normalize(images.float() / 255, mean, std)
    for given in (images, images.float()):
        assert torch.allclose(kd.normalise(given), expected, atol=1e-5)
    assert kd.normalise(images).dtype is torch.float32


def test_epoch_shows_views_of_every_image_once_in_an_order_of_its_own(settings):
    split = make_split(50)
    number = torch.arange(50, device=kd.DEVICE, dtype=torch.uint8).view(50, 1, 1, 1)
    split.images = number.expand(50, 3, 32, 32)
    batches = list(kd.augmented_batches(split, settings, 0))
    targets = torch.cat([targets for _, targets in batches])
    red = torch.cat([images[:, 0].mean((1, 2)) for images, _ in batches])
    seen = (red * 0.229 * 255 + 0.485 * 255).round().long()
    assert len(seen) == len(set(seen.tolist())) == 48  # the incomplete batch is dropped
    assert torch.equal(targets, split.targets[seen]) and (seen.diff() < 0).any()

    split, callers = make_split(), torch.get_rng_state()
    runs = [list(kd.augmented_batches(split, settings, epoch)) for epoch in (0, 0, 1)]
    first, again, other = ([images for images, _ in run] for run in runs)
    assert torch.equal(torch.get_rng_state(), callers)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    plain = kd.normalise(split.images).flatten(1)
    assert torch.cdist(first[0].flatten(1), plain).min() > 1  # all of them are changed


def test_views_crop_and_mirror_as_torchvision_does():
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


def test_views_are_drawn_from_their_whole_range():
    with kd.seeded(0):
        views = kd.draw_views(4000, min_crop=0.35)
    assert views.shape == (4000, 2, 3) and not views[:, [0, 1], [1, 0]].any()
    width, height = views[:, 0, 0].abs(), views[:, 1, 1]
    area, aspect = width * height, width / height
    assert 0.33 < area.min() < 0.37 and area.max() > 0.95 and 0.6 < area.mean() < 0.68
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35
    assert 0.47 < (views[:, 0, 0] < 0).float().mean() < 0.53
    for offset, side in ((views[:, 0, 2], width), (views[:, 1, 2], height)):
        assert (offset.abs() <= 1 - side + 1e-6).all()  # within the image
        place = (offset / (1 - side))[side < 0.95]  # −1 … 1: from edge to edge
        assert place.mean().abs() < 0.05 and place.std() > 0.5
