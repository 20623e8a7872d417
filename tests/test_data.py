"""The way from an archive, or a folder of one's own, to augmented batches."""

import hashlib
import io
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, make_split, own_folder, photograph, run_cells, save, scene
from PIL import Image
from torchvision.datasets import Imagenette
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
    (folder / "val/b/.DS_Store").touch()  # as a Mac does: it is not counted
    kd.download_dataset("tiny", tmp_path)
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
    known = f"{kd.BASE_URL}/imagenette2-160.tgz", kd.DATASETS["imagenette2-160"][0]
    assert Imagenette._ARCHIVES["160px"] == known
    serve(small)
    with pytest.raises(ValueError, match=r"holds \(2, 1\) images, not \(2, 2\)"):
        kd.download_dataset("tiny", tmp_path / "root", "https://x")


def test_readmes_script_runs_as_it_stands(tmp_path, serve, monkeypatch, capsys):
    [script] = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    for number in range(36):
        side, name = ("train", "val")[number % 2], "ab"[number // 6 % 2]
        save(tmp_path / f"imagewoof2-160/{side}/{name}/{number}.png", scene(number))
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        tar.add(tmp_path / "imagewoof2-160", "imagewoof2-160")
    shutil.rmtree(tmp_path / "imagewoof2-160")
    archive = (tmp_path / "x.tgz").read_bytes()
    serve(archive)
    known = (hashlib.md5(archive).hexdigest(), (18, 18))
    monkeypatch.setitem(kd.DATASETS, "imagewoof2-160", known)
    state = kd.build_classifier(1000, "resnet50").state_dict()
    weights = "torchvision.models.ResNet50_Weights.get_state_dict"
    monkeypatch.setattr(weights, lambda self, progress: state)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    told = capsys.readouterr().out

    students = kd.read_checkpoint(tmp_path / "runs/mine/mine.pt")["students"]
    val = kd.load_splits(tmp_path / "data/imagewoof2-160", 128)["val"]
    for seed in range(3):
        both = [students["mine", arm, seed] for arm in ("distilled", "alone")]
        right = [(one["logits"].argmax(1) == val.targets.cpu()).float() for one in both]
        assert f"seed {seed}: {100 * (right[0] - right[1]).mean():+.1f} points" in told
    assert set(re.findall(r"\S+ points", told)) != {"+0.0 points"}
    teacher = kd.read_checkpoint(tmp_path / "runs/mine/teacher.pt")
    assert len(teacher["seconds"]) == 2 and len(students) == 6


# ── A folder of one's own ─────────────────────────────────────────────────
def test_own_folder_keeps_its_names_and_what_is_no_image_is_left_out(tmp_path):
    images = {
        "tabby, tabby cat": photograph(30, "L"),
        "n03888257": photograph(60, "CMYK"),
        "n01440764": photograph(90),
    }
    folder = own_folder(tmp_path / ".hidden" / "demo", images)
    train = folder / "train"
    (train / "n03888257/trip/2").mkdir(parents=True)
    (train / "n03888257/trip/2/deep.JPEG").write_bytes(photograph(120))
    for folders in (".ipynb_checkpoints", "n01440764/.trash"):
        (train / folders).mkdir()
    hidden = ".ipynb_checkpoints/x.jpg", "n01440764/.trash/x.jpg"
    hidden += "n01440764/._one.jpg", "n01440764/.DS_Store"
    others = "notes.txt", "n01440764/notes.txt", "n03888257/film.mp4", "loose.jpg"
    for name in (*hidden, *others):
        (train / name).write_bytes(photograph(200))
    (train / "n01440764/broken.jpg").write_bytes(photograph()[:300])
    before = sorted(tmp_path.rglob("*"))
    found = kd.load_splits(folder, 16, {"n01440764": "tench"})
    assert sorted(tmp_path.rglob("*")) == before
    assert len(found["unlabelled"]) == 0 and len(found["val"]) == 3
    found = found["train"]
    assert found.classes == ("tench", "n03888257", "tabby, tabby cat")
    assert found.targets.tolist() == [0, 1, 1, 2]
    pixels = found.images_at(slice(None))[:, 0, 8, 8]
    assert pixels.tolist() == pytest.approx([90, 60, 120, 30], abs=3)
    files = [found.paths[place] for place in found.places.tolist()]
    assert [file.removeprefix(f"{train}/") for file in files] == [
        "n01440764/0.jpg",
        "n03888257/0.jpg",
        "n03888257/trip/2/deep.JPEG",
        "tabby, tabby cat/0.jpg",
    ]


def test_folders_that_cannot_be_used_are_named(tmp_path):
    def refuse(name, told, **images):
        with pytest.raises(ValueError, match=told):
            kd.load_splits(own_folder(tmp_path / name, images), 16)

    with pytest.raises(ValueError, match=r"'imagewolf'.*imagewoof2-160"):
        kd.download_dataset("imagewolf")
    refuse(
        "one",
        r"one: need train and val, or class folders; has \['pets'\]",
        pets=photograph(),
    )
    refuse(
        "broken",
        r"broken: no photograph that can be read",
        a=b"no",
        b=photograph()[:300],
    )
    many = own_folder(tmp_path / "many", {f"c{n}": photograph() for n in range(30)})
    shutil.rmtree(many / "val/c17")
    with pytest.raises(
        ValueError, match=r"train and val differ by the classes \['c17'\]$"
    ):
        kd.load_splits(many, 16)
    shutil.move(many / "train/c17", many / "val/c17")
    with pytest.raises(ValueError, match=r"by the classes \['c17'\]$"):
        kd.load_splits(many, 16)
    shutil.copytree(many / "val/c17", many / "train/c17")
    (many / "val/c17/0.jpg").unlink()
    with pytest.raises(ValueError, match=r"no photograph for val of \['c17'\]$"):
        kd.load_splits(many, 16)
    shutil.move(many / "val", many / "test")
    with pytest.raises(ValueError, match="need train and val"):
        kd.load_splits(many, 16)
    for name in "ab":
        (tmp_path / "pdf" / name).mkdir(parents=True)
        (tmp_path / "pdf" / name / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(
        ValueError, match=r"pdf: no photograph that can be read, in \['a', 'b'\]"
    ):
        kd.load_splits(tmp_path / "pdf", 16)


def test_a_fifth_is_set_aside_and_copies_stay_on_one_side(tmp_path):
    for number in range(60):
        name = "large" if number < 40 else "small"
        path = tmp_path / "pets" / name / f"{number}.png"
        save(path, scene(number))
        if number % 4 == 0:  # each fourth one has a copy, under the other label
            other = "small" if name == "large" else "large"
            copy = path.parents[1] / other / f"copy_{number}.jpg"
            save(copy, scene(number)[:, ::-1], quality=80)
    save(tmp_path / "pets/unlabelled/deep/x.png", scene(99))
    found = kd.load_splits(tmp_path / "pets", 32)
    assert len(found["unlabelled"]) == 1 and found["unlabelled"].targets.item() == -1
    sides = {}
    for side in ("train", "val"):
        split = found[side]
        assert split.classes == ("large", "small") and split.whole is None
        for place, label in zip(
            split.places.tolist(), split.targets.tolist(), strict=True
        ):
            path = Path(split.paths[place])
            assert split.classes[label] == path.parent.name
            sides.setdefault(path.stem.split("_")[-1], set()).add(side)
            pixels = kd.read_image(path, 32).to(kd.DEVICE)
            assert torch.equal(split.pixels[place], pixels)
    assert len(sides) == 60 and all(len(where) == 1 for where in sides.values())
    counts = found["val"].targets.bincount().tolist()
    for count, size in zip(counts, (40 + 5, 20 + 10), strict=True):
        assert 0.5 * size / 5 < count <= 1.6 * size / 5
    again = kd.load_splits(tmp_path / "pets", 32)
    assert torch.equal(again["val"].places, found["val"].places)


def test_a_chain_of_copies_stays_together_and_sides_have_their_sizes(monkeypatch):
    chain = torch.tensor([[0, 5], [3, 5], [5, 9], [20, 21], [21, 22]])
    monkeypatch.setattr(kd, "find_copies", lambda split: chain)
    split = make_split(60)
    train, val = kd.split_off(split)
    assert val.targets.bincount().sum() == 3 * 4  # a fifth of 20 photographs a class
    assert val.places.max() > 30  # by chance, not the first ones
    assert sorted([*train.places.tolist(), *val.places.tolist()]) == list(range(60))
    for together in ({0, 3, 5, 9}, {20, 21, 22}):
        assert len(together & set(val.places.tolist())) in (0, len(together))
    pairs = torch.arange(60).view(2, 30).T  # each has one copy
    monkeypatch.setattr(kd, "find_copies", lambda split: pairs)
    assert len(kd.split_off(split)[1]) == 12
    pairs = pairs[:0]
    assert len(kd.split_off(make_split(6))[1]) == 3  # one of two
    part = split.subset(torch.arange(9)).subset(torch.arange(3))
    assert part.whole is split and part.places.tolist() == [0, 1, 2]


def as_split(pictures):
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    number = torch.arange(len(images))
    columns = [column.to(kd.DEVICE) for column in (images, number, 0 * number)]
    return kd.Split(columns[0], [], ("a", "b"), *columns[1:])


def test_copies_are_found_and_skies_and_white_grounds_are_none(tmp_path):
    changes = [
        lambda x: x[:, ::-1],  # mirrored
        lambda x: (0.7 * x.astype(float) + 20).astype(np.uint8),  # flatter
        lambda x: x // 2 + x.mean(2, keepdims=True).astype(np.uint8) // 2,  # paler
        lambda x: np.array(Image.fromarray(x).resize((40, 40)).resize((64, 64))),
        lambda x: np.array(Image.fromarray(x).rotate(1)),
        lambda x: np.array(Image.fromarray(x[1:, 1:]).resize((64, 64))),
    ]
    pictures = [scene(number) for number in range(300)]
    pictures += [change(scene(59 * n)) for n, change in enumerate(changes)]
    rng = np.random.default_rng(0)
    for number in range(300):  # a sky, and something small on white
        sky = np.linspace(200, 90 + number % 50, 64)[:, None, None] + rng.normal(
            0, 3, (64, 64, 3)
        )
        white, (x, y, wide, high) = np.full((64, 64, 3), 255.0), rng.integers(12, 32, 4)
        patches = Image.fromarray(rng.integers(0, 200, (3, 3, 3), dtype=np.uint8))
        white[y : y + high, x : x + wide] = patches.resize((wide, high))
        pictures += [sky.clip(0, 255).astype(np.uint8), white.astype(np.uint8)]
    pictures += [np.full((64, 64, 3), level, np.uint8) for level in (0, 255, 255)]
    for level in (90, 180):  # plain, with a trifle at the same place
        pictures.append(np.full((64, 64, 3), level, np.uint8))
        pictures[-1][8:12, 8:12] += 1
    found = kd.find_copies(as_split(pictures)).tolist()
    assert found == [[59 * n, 300 + n] for n in range(len(changes))]


SHARED = Path(__file__).resolve().parents[2] / "shared/data/imagewoof2-160.tgz"


@pytest.mark.skipif(not SHARED.exists(), reason="needs Imagewoof")
def test_copies_on_both_sides_of_imagewoof_are_found(tmp_path):
    with tarfile.open(SHARED) as tar:
        tar.extractall(tmp_path, filter="data")
    splits = kd.load_splits(tmp_path / "imagewoof2-160", 32)
    sizes = len(splits["train"]), len(splits["val"])
    assert kd.DATASETS["imagewoof2-160"][1] == sizes
    names = {"join": None, "in_both": None}
    given = {
        "train_split": splits["train"],
        "val_split": splits["val"],
        "replace": replace,
    }
    names = run_cells("# @title Which photographs are there twice", **given)
    assert names["in_train"].nonzero()[:, 0].tolist() == [399, 1309, 1320, 1331, 1413]


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
    assert read(np.zeros((32, 32, 2))).min() == 255  # grey, and clear
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
    for pixels in (deep["x.png"], deep["x.tif"]):  # a TIFF may say that 0 is white
        Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo={262: 0})
        found = kd.read_image(tmp_path / "x.tif", 32)
        assert (found[:, :, 5].float() - (255 - expected)).abs().max() <= 1
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
    expected = kd.normalise(kd.augment(split.images_at(order), views.to(kd.DEVICE)))
    batches = list(kd.augmented_batches(split, settings, epoch=1))
    images, targets = map(torch.cat, zip(*batches, strict=True))
    assert len(images) == 48 and torch.equal(torch.get_rng_state(), callers)
    assert torch.allclose(images, expected[:48], atol=1e-4)
    assert torch.equal(targets, split.targets[order[:48]])


def test_views_and_their_normalisation_are_torchvisions():
    images = make_split(2).images_at(slice(None))
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
