"""From an archive to augmented batches, on drawn images over loopback HTTP and, where they are at hand, on the real ones."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

import kd_utils as kd

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """(folder that holds demo.tgz, checksum)"""
    folder = tmp_path_factory.mktemp("source")
    _, checksum = kd.draw_demo_archive(folder)
    return folder, checksum


@pytest.fixture(scope="module")
def server(archive):
    handler = functools.partial(QuietHandler, directory=archive[0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(scope="module")
def dataset(archive, server, tmp_path_factory):
    return kd.download_dataset("demo", tmp_path_factory.mktemp("data"), base_url=server, checksum=archive[1])


@pytest.fixture
def copy(dataset, tmp_path):
    return Path(shutil.copytree(dataset, tmp_path / "demo"))


def test_download_unpacks_every_image_and_leaves_nothing_else(dataset):
    assert {path.name for path in dataset.parent.iterdir()} - {"cache", ".demo.lock"} == {"demo"}
    for split, count in kd.DATASETS["demo"].counts.items():
        assert len(list((dataset / split).glob("*/*.JPEG"))) == count


def test_unpacked_dataset_is_used_as_it_stands(dataset):
    assert kd.download_dataset("demo", dataset.parent, base_url="http://127.0.0.1:1") == dataset


def test_unknown_dataset_is_named():
    with pytest.raises(ValueError, match="unknown dataset 'cifar10'.*imagewoof2-160"):
        kd.download_dataset("cifar10")


def test_demo_has_grey_scale_and_cmyk_files(dataset):
    modes = {Image.open(path).mode for path in (dataset / "train").glob("*/*")}
    assert modes == {"RGB", "L", "CMYK"}


def test_load_images(dataset):
    data = kd.load_images(dataset, 64)
    counts = kd.DATASETS["demo"].counts
    for name in ("train", "val"):
        split = data[name]
        assert split.images.shape == (counts[name], 3, 64, 64) and split.images.dtype == torch.uint8
        assert split.targets.bincount().tolist() == [counts[name] // 10] * 10
        assert all(split.classes[target] == Path(file).parent.name for target, file in zip(split.targets, split.files))
    assert int(data["val"].never_seen.sum()) == 40 and not data["train"].never_seen.any()


def test_decoding_scales_the_short_side_and_crops_the_centre(tmp_path):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255  # the central square of a wide image
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (kd.decode_images([tmp_path / "wide.png"], 64) == 255).float().mean() > 0.9


def test_cache_spares_the_decoding_until_a_file_changes(copy):
    first = kd.load_images(copy, 64)
    for path in copy.glob("*/*/*"):
        path.write_bytes(bytes(path.stat().st_size))  # no longer images, but nobody reads them
    assert torch.equal(first["val"].images, kd.load_images(copy, 64)["val"].images)
    path.write_bytes(b"another size")
    with pytest.raises(ValueError, match="unreadable image"):
        kd.load_images(copy, 64)


def test_unreadable_image_is_named(copy):
    broken = sorted((copy / "val" / "ring").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"1 unreadable image.*{broken.name}"):
        kd.load_images(copy, 64)


def test_empty_class_folder_is_named(copy):
    for path in (copy / "train" / "cross").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="train/cross"):
        kd.load_images(copy, 64)


def test_folder_of_ones_own(dataset, tmp_path):
    own = tmp_path / "flowers"
    for split in ("train", "val"):
        for name in ("disc", "ring"):
            shutil.copytree(dataset / split / name, own / split / name)
    (own / "train" / ".ipynb_checkpoints").mkdir()
    assert kd.load_images(own, 64)["train"].classes == ["disc", "ring"]
    shutil.rmtree(own / "val" / "disc")  # the labels of val are those of train, so this must not pass unseen
    with pytest.raises(FileNotFoundError, match="val/disc"):
        kd.load_images(own, 64)


def test_selection_is_stratified_fixed_and_part_of_train(dataset):
    data = kd.load_images(dataset, 64)
    rest, selection = kd.selection_split(data["train"])
    per_class = len(data["train"]) // 100
    assert selection.targets.bincount().tolist() == [per_class] * 10
    assert set(rest.files) | set(selection.files) == set(data["train"].files) and not set(rest.files) & set(selection.files)
    assert selection.files == data["selection"].files


def test_crops_match_torchvision():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8, generator=generator)
    boxes = kd.sample_crops(32, 64, generator)
    flip = torch.arange(32) % 2 == 0
    ours = kd.crop_and_resize(images, boxes, flip)
    for image, box, flipped, view in zip(images, boxes.tolist(), flip, ours):
        expected = TF.resized_crop(image.float(), *box, size=[64, 64], antialias=True)
        torch.testing.assert_close(view, TF.horizontal_flip(expected) if flipped else expected, atol=0.02, rtol=0)


def test_crop_boxes_follow_scale_and_aspect_and_stay_inside():
    boxes = kd.sample_crops(5000, 96, torch.Generator().manual_seed(1)).float()
    top, left, height, width = boxes.unbind(1)
    assert (boxes[:, :2] >= 0).all() and (top + height <= 96).all() and (left + width <= 96).all()
    area, aspect = height * width / 96**2, width / height
    assert 0.33 < area.min() < 0.37 and area.max() > 0.95 and 0.72 < aspect.min() < 0.77 and 1.30 < aspect.max() < 1.38


def test_normalise_matches_torchvision():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    expected = TF.normalize(images.float() / 255, kd.IMAGENET_MEAN, kd.IMAGENET_STD)
    torch.testing.assert_close(kd.normalise(images), expected)


def test_stream_is_a_function_of_seed_and_epoch(dataset):
    train = kd.load_images(dataset, 64)["train"]
    batches = {(seed, epoch): list(kd.BatchStream(train, 32, seed).epoch(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))}
    again = kd.BatchStream(train, 32, 0)
    list(again.epoch(1))  # what was drawn before does not matter
    for (images, targets), (same_images, same_targets) in zip(batches[0, 0], again.epoch(0)):
        assert torch.equal(images, same_images) and torch.equal(targets, same_targets)
    for other in ((0, 1), (1, 0)):
        assert not torch.equal(batches[0, 0][0][0], batches[other][0][0])
    assert len(batches[0, 0]) == len(train) // 32


@pytest.mark.skipif(not SHARED.exists(), reason="the real data are not at hand")
@pytest.mark.parametrize("name, counts, first", [("imagewoof2-160", (9025, 3929, 162), "Shih-Tzu"), ("imagenette2-160", (9469, 3925, 134), "tench")])
def test_real_archive(tmp_path, name, counts, first):
    sums = dict(reversed(line.split()) for line in (SHARED / "SHA256SUMS").read_text().splitlines())
    folder = kd.download_dataset(name, tmp_path, base_url=SHARED.as_uri(), checksum=f"sha256:{sums[f'{name}.tgz']}")
    data = kd.load_images(folder, 64)
    assert (len(data["train"]), len(data["val"]), int(data["val"].never_seen.sum())) == counts
    assert data["val"].classes[0] == first and 80 < data["val"].images.float().mean() < 150


@pytest.mark.skipif(not SHARED.exists(), reason="the real data are not at hand")
def test_real_teacher_weights_from_a_file():
    teacher = kd.build_teacher(10, SHARED / "resnet50_standin.pth")
    stored = torch.load(SHARED / "resnet50_standin.pth", weights_only=True)
    assert torch.equal(teacher.conv1.weight, stored["conv1.weight"].float()) and teacher.fc.out_features == 10
