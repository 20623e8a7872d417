"""The way from an archive, or a folder of one's own, to augmented batches."""

import hashlib
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor

import conftest as kit
import numpy as np
import pytest
import torch
from conftest import GOOD, IMAGES, archive_of, image_of, make_split, photograph, serving
from PIL import Image
from torchvision.transforms import functional as tv

import kd_utils as kd


# ── Archives ──────────────────────────────────────────────────────────────
def test_archive_is_downloaded_until_it_is_whole_and_then_used(tmp_path):
    changed = GOOD[:99] + b"?" + GOOD[100:]
    with serving(GOOD[:-20], changed, GOOD) as (url, asked):
        folder = kd.download_dataset("tiny", tmp_path, url)
        assert kd.download_dataset("tiny", tmp_path, url) == folder == tmp_path / "tiny"
    assert asked == ["/tiny.tgz"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("answer", [GOOD[:-20], b"", kit.SILENCE])
def test_archive_that_cannot_be_had_is_given_up(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(kd, "DOWNLOAD_SECONDS", 0.2)
    (tmp_path / "tiny/train/a").mkdir(parents=True)
    (tmp_path / "tiny/train/a/x.JPEG").write_bytes(photograph())
    with serving(answer) as (url, asked), pytest.raises(ConnectionError) as error:
        kd.download_dataset("tiny", tmp_path, url)
    reason = {GOOD[:-20]: "MD5", b"": "404"}.get(answer, "timed out")
    for told in (str(tmp_path / "tiny"), "(1, 0)", "(2, 2)", url, reason):
        assert told in str(error.value)
    assert len(asked) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


SPECIAL = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, *SPECIAL])
def test_members_that_escape_are_refused(tmp_path, kind):
    name = "../escaped" if kind == tarfile.REGTYPE else "tiny/special"
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "../../outside"
    evil = archive_of({**IMAGES, name: member})
    md5 = hashlib.md5(evil).hexdigest()
    with serving(evil) as (url, _), pytest.raises(tarfile.FilterError):
        kd.download_dataset("tiny", tmp_path / "root", url, md5=md5)
    assert [path.name for path in tmp_path.rglob("*")] == ["root"]


def test_folder_or_archive_with_too_few_images_is_not_used(tmp_path, capsys):
    small = archive_of(dict(list(IMAGES.items())[:3]))
    md5 = hashlib.md5(small).hexdigest()
    with serving(GOOD, small) as (url, _):
        folder = kd.download_dataset("tiny", tmp_path, url)
        with pytest.raises(ValueError, match=r"tiny\.tgz.*\(2, 1\).*\(2, 2\)"):
            kd.download_dataset("tiny", tmp_path / "other", url, md5=md5)
    (folder / "val" / "b" / "x.JPEG").unlink()
    with serving(GOOD) as (url, _):
        kd.download_dataset("tiny", tmp_path, url)
    assert kd.count_images(folder) == (2, 2)
    assert kd.count_images(tmp_path / "tiny.1") == (2, 1)
    assert re.search(r"tiny .*\(2, 1\).*\(2, 2\)", capsys.readouterr().out)


def test_two_notebooks_may_draw_the_demo_at_once(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        folders = list(pool.map(kd.download_dataset, ["demo"] * 2, [tmp_path] * 2))
    assert folders == [tmp_path / "demo"] * 2 and len(list(tmp_path.iterdir())) == 1
    val = kd.load_split(folders[0], "val", 32)
    assert val.images.shape == (100, 3, 32, 32) and val.images.dtype is torch.uint8
    assert val.classes[0] == "gold disc" and (val.targets.bincount() == 10).all()
    assert val.never_seen.sum() == 40 and val.images.device.type == kd.DEVICE.type


# ── A folder of one's own ─────────────────────────────────────────────────
def test_folder_of_ones_own_keeps_its_names_and_order(tmp_path):
    modes = {"tabby, tabby cat": "L", "n03888257": "CMYK", "n01440764": "RGB"}
    images = {name: photograph(mode) for name, mode in modes.items()}
    folder = kit.own_folder(tmp_path / "demo", **images)
    (folder / "train/n03888257/ILSVRC2012_val_7.JPEG").write_bytes(photograph())
    assert kd.download_dataset(str(folder)) == folder
    found = kd.load_split(folder, "train", 16)
    assert found.classes == ("tench", "parachute", "tabby, tabby cat")
    assert found.targets.tolist() == [0, 1, 1, 2]
    assert found.never_seen.tolist() == [False, True, False, False]


def test_what_is_hidden_or_unknown_is_left_out(tmp_path, capsys):
    folder = kit.own_folder(tmp_path / "pets", cat=photograph(), dog=photograph())
    for hidden in (".ipynb_checkpoints/x.jpg", "cat/._one.jpg", "cat/.DS_Store"):
        (folder / "train" / hidden).parent.mkdir(exist_ok=True)
        (folder / "train" / hidden).write_bytes(b"nothing")
    for unknown in ("cat/notes.txt", "dog/film.mp4"):
        (folder / "train" / unknown).write_bytes(b"nothing")
    found = kd.load_split(folder, "train", 16)
    assert found.classes == ("cat", "dog") and len(found) == 2
    assert f"{folder / 'train'}: 2 files" in capsys.readouterr().out


def test_folders_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'imagewolf'.*imagewoof2-160"):
        kd.download_dataset("imagewolf")
    deep = kit.own_folder(tmp_path / "deep", pets=photograph())
    with pytest.raises(ValueError, match=r"two or more .*\['pets'\]"):
        kd.load_split(deep, "train", 16)
    (deep / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no image"):
        kd.load_split(deep, "train", 16)
    (deep / "train" / "empty" / "broken.jpg").write_bytes(photograph()[:300])
    with pytest.raises(ValueError, match=r"cannot read the image .*broken\.jpg"):
        kd.load_split(deep, "train", 16)


def test_images_are_upright_and_cut_at_the_centre(tmp_path):
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)  # red, green in the centre, blue
    stripes[:, :32, 0] = stripes[:, 32:96, 1] = stripes[:, 96:, 2] = 255
    found = image_of(tmp_path, Image.fromarray(stripes))
    assert found[:, :, 3:-3].float().mean((1, 2)).tolist() == [0, 255, 0]

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left of the file is the top
    halves = np.zeros((32, 32, 3), dtype=np.uint8)
    halves[:, :16] = 255
    found = image_of(tmp_path, Image.fromarray(halves), "x.jpg", exif=exif).float()
    assert found[:, :14].mean() > 250 and found[:, 18:].mean() < 5


def test_transparency_is_put_on_white_and_16_bit_grey_is_scaled(tmp_path):
    clear = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    assert (image_of(tmp_path, clear) == 255).all()
    assert (image_of(tmp_path, Image.new("LA", (32, 32), (9, 0))) == 255).all()
    palette = Image.new("RGB", (32, 32), (200, 0, 0)).quantize(2)
    first = palette.getpixel((0, 0))
    assert (image_of(tmp_path, palette, transparency=first) == 255).all()
    half = image_of(tmp_path, Image.new("RGBA", (32, 32), (200, 0, 0, 128)))
    assert half[:, 9, 9].tolist() == pytest.approx([227, 127, 127], abs=1)
    grey = Image.fromarray(np.full((32, 32), 32896, dtype=np.uint16))
    assert (image_of(tmp_path, grey) == 128).all()


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
