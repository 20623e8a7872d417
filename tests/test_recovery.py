"""Faults, made on purpose: a server that misbehaves, archives and files that lie, full disks, killed and interrupted trainings."""

import functools
import http.server
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import struct
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import kd_utils as kd

TRAINING = dict(epochs=10, batch_size=16, lr=2e-3, weight_decay=0.05)


# ── Transfers ──


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Serves files with Range, except that each request uses up one of `faults`."""

    faults: list[str] = []
    ranges: list[str] = []

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else ""
        body = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        self.ranges.append(self.headers.get("Range", ""))
        if fault.isdigit():
            return self.send_error(int(fault))
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers and fault != "no range" else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        length = len(body) - start
        self.send_header("Content-Length", str(length + {"too long": 1000, "too short": -1000}.get(fault, 0)))
        self.end_headers()
        half = start + length // 2
        self.wfile.write(body[start : half if fault in ("drop", "reset", "stall") else len(body)])
        self.wfile.flush()
        if fault == "stall":
            time.sleep(2.5)
        if fault == "reset":  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return folder, kd.draw_demo_archive(folder)[1]


@pytest.fixture(scope="module")
def address(archive):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Faulty, directory=archive[0])) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def download(archive, address, tmp_path, monkeypatch):
    """Downloads the drawn archive from a server with the given faults."""
    monkeypatch.setattr(kd, "RETRY_WAITS", (0.01, 0.02, 0.03))
    monkeypatch.setattr(kd, "NETWORK_TIMEOUT", 1)

    def run(*faults, **changes):
        Faulty.faults, Faulty.ranges = list(faults), []
        return kd.download_dataset("demo", tmp_path, **{"base_url": address, "checksum": archive[1], **changes})

    return run


def whole(folder):
    return not kd._wrong_counts(folder, kd.DATASETS["demo"])


@pytest.mark.parametrize(
    "faults",
    [["drop"], ["reset"], ["drop", "reset", "drop", "drop", "drop"], ["503", "503"], ["stall"], ["no range"], ["drop", "no range"], ["too long"],
     ["drop", "503", "429", "stall", "drop"]],
    ids=" ".join,
)  # fmt: skip
def test_transfer_survives(download, faults):
    assert whole(download(*faults))
    if "drop" == faults[0]:
        assert int(Faulty.ranges[1].removeprefix("bytes=").rstrip("-")) > 100_000  # what had arrived was not asked for again


def test_transfer_continues_in_a_later_call(download, tmp_path):
    with pytest.raises(ConnectionError, match="gave up after 4 tries.*bytes are kept, run again to continue"):
        download("drop", *["503"] * 10)
    kept = (tmp_path / "demo.tgz").stat().st_size
    assert kept > 100_000 and whole(download()) and Faulty.ranges == [f"bytes={kept}-"]


def test_missing_file_is_not_tried_again(download):
    with pytest.raises(ConnectionError, match="answers 404"):
        download("404")
    assert len(Faulty.ranges) == 1


def test_wrong_file_is_set_aside_and_fetched_once_more(download, archive, tmp_path):
    assert whole(download("too short", size=(archive[0] / "demo.tgz").stat().st_size))  # the first answer was cut
    assert (tmp_path / "demo.tgz.aside1").exists()


@pytest.mark.parametrize("wrong", [{"checksum": "md5:" + "0" * 32}, {"size": 17}])
def test_wrong_file_twice_is_an_error(download, tmp_path, wrong):
    with pytest.raises(ValueError, match="expected .* got .*, twice"):
        download(**wrong)
    assert len(Faulty.ranges) == 2 and not (tmp_path / "demo").exists() and len(list(tmp_path.glob("demo.tgz.aside*"))) == 2


def test_https_does_not_fall_back_to_http(monkeypatch, tmp_path):
    class Response(io.BytesIO):
        url, status, headers = "http://elsewhere/demo.tgz", 200, {}

    monkeypatch.setattr(kd.urllib.request, "urlopen", lambda *_, **__: Response(b"x"))
    with pytest.raises(ValueError, match="http://elsewhere/demo.tgz, which is not encrypted"):
        kd.download_dataset("demo", tmp_path, base_url="https://somewhere", checksum="md5:" + "0" * 32)


def test_no_space_is_said_before_starting(download):
    with pytest.raises(OSError, match="need 2,200,000,000,000,000,[0-9]+ bytes .* are free"):
        download(size=10**18)
    assert Faulty.ranges == []


# ── Datasets ──


def test_half_unpacked_folder_is_replaced_and_kept_aside(download, tmp_path, capsys):
    folder = download()
    next((folder / "val" / "disc").iterdir()).unlink()
    assert whole(download()) and (tmp_path / "demo.aside1" / "val").exists()
    assert "expected 100 images in val, found 99; set aside as demo.aside1" in capsys.readouterr().out


def download_packed(folder):
    checksum = f"sha256:{kd.file_digest(folder / 'demo.tgz')}"
    kd.download_dataset("demo", folder / "data", base_url=folder.as_uri(), checksum=checksum)


def test_incomplete_archive_is_named(tmp_path):
    with tarfile.open(tmp_path / "demo.tgz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="wrong number of images: expected 300 images in train, found 0; expected 100"):
        download_packed(tmp_path)


@pytest.mark.parametrize("name, kind", [("../escaped", tarfile.REGTYPE), ("/escaped", tarfile.REGTYPE), ("demo/link", tarfile.SYMTYPE),
                                        ("demo/hard", tarfile.LNKTYPE), ("demo/device", tarfile.CHRTYPE), ("demo/pipe", tarfile.FIFOTYPE)])  # fmt: skip
def test_archive_members_that_are_no_plain_files_are_refused(tmp_path, name, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
    with tarfile.open(tmp_path / "demo.tgz", "w:gz") as tar:
        tar.addfile(member, io.BytesIO(b"bad"))
    with pytest.raises((ValueError, tarfile.FilterError), match="refused|cannot be unpacked"):
        download_packed(tmp_path)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".demo.lock", "demo.tgz"} and not (tmp_path / "escaped").exists()


def test_two_notebooks_at_once(archive, tmp_path):
    fetch = partial(kd.download_dataset, "demo", tmp_path, base_url=archive[0].as_uri(), checksum=archive[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_utils"])
    both = [context.Process(target=fetch_and_load, args=(fetch,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0] and whole(tmp_path / "demo")
    assert not list(tmp_path.glob("*.aside*"))


def fetch_and_load(fetch):
    assert len(kd.load_images(fetch(), 64)["train"]) == 300


def test_damaged_cache_is_decoded_again(download, capsys):
    folder = download()
    first = kd.load_images(folder, 64)["train"].images
    cache = next((folder.parent / "cache").glob("demo-train-*.pt"))
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, in the middle of the images
    cache.write_bytes(content)
    assert torch.equal(kd.load_images(folder, 64)["train"].images, first)
    assert "cannot be used" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give up its rights to write")
def test_read_only_data_root_works_when_the_data_are_complete(download):
    folder = download()
    public = Path("/tmp") / f"kd-read-only-{os.getpid()}"  # pytest's own folders are closed to other users
    try:
        shutil.copytree(folder, public / "demo")
        process = multiprocessing.get_context("forkserver").Process(target=load_as_nobody, args=(public,))
        process.start()
        process.join(120)
        assert process.exitcode == 0 and {path.name for path in public.iterdir()} == {"demo"}
    finally:
        shutil.rmtree(public)


def load_as_nobody(root):
    Image.init()  # whoever gives up its rights may not be able to read Pillow's plugins any more
    os.setuid(65534)
    assert not os.access(root, os.W_OK)
    assert len(kd.load_images(kd.download_dataset("demo", root), 64)["train"]) == 300


# ── Training ──


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Such small networks gain nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (52, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return kd.Split(images, torch.arange(52) % 3, ["red", "green", "blue"], [f"{i}.JPEG" for i in range(52)])


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_RUNS_DIR", str(tmp_path))
    return kd.Run("imagewoof2-160", "demo")


class SmallCNN(nn.Sequential):
    """Batch normalisation has buffers, dropout draws random numbers: both have to survive."""

    def __init__(self, num_classes):
        body = nn.Conv2d(3, 8, 7, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(*body, nn.Dropout(0.3), nn.Linear(8, num_classes))


def cohort(loss=kd.label_loss, arm="alone", num_classes=3):
    return kd.make_students(num_classes, (0, 1), arm, loss, {"LeNet-5": kd.LeNet5, "small CNN": SmallCNN})


def states(students):
    return [(student.model.state_dict(), student.history, student.stopped) for student in students]


def identical(first, second):
    return all(
        a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a[0].values(), b[0].values(), strict=True))
        for a, b in zip(states(first), states(second), strict=True)
    )


def trained(run, train, students=None, **changes):
    with run.stage("a stage"):
        return kd.fit(students or cohort(), train, train, **{**TRAINING, **changes})


def train_and_count(train, folder, steps):
    """What a notebook's process does; `steps` counts its steps, and every step is followed by a checkpoint."""
    os.environ["KD_RUNS_DIR"] = str(folder)
    torch.set_num_threads(1)
    kd.CHECKPOINT_SECONDS = 0

    def loss(student_logits, teacher_logits, targets):
        with steps.get_lock():
            steps.value += 1
        return kd.label_loss(student_logits, teacher_logits, targets)

    students = trained(kd.Run("imagewoof2-160", "demo"), train, cohort(loss, num_classes=10))
    torch.save([(model, vars(history)) for model, history, _ in states(students)], folder / "end.pt")


def test_killed_twenty_times_and_more_and_resumed_bit_for_bit(archive, tmp_path):
    folder = kd.download_dataset("demo", tmp_path, base_url=archive[0].as_uri(), checksum=archive[1])
    train = kd.load_images(folder, 64)["val"].subset(torch.arange(0, 100, 2))  # five drawn images of each class
    rng, context = random.Random(0), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_utils"])

    def life(folder, kill_after=None):
        folder.mkdir(exist_ok=True)
        steps = context.Value("i", 0)
        process = context.Process(target=train_and_count, args=(train, folder, steps))
        process.start()
        while process.is_alive() and (kill_after is None or steps.value < kill_after):
            time.sleep(0.001)
        if kill_after is not None:
            time.sleep(rng.uniform(0, 0.02))  # into the step or into the writing of the checkpoint
            process.kill()
        process.join()
        return process.exitcode

    assert life(tmp_path / "whole") == 0
    kills = 0
    for _ in range(40):  # 30 steps in all, and each life makes one at least
        if (exit_code := life(tmp_path / "killed", kill_after=rng.randint(1, 6))) == 0:
            break
        assert exit_code == -signal.SIGKILL
        kills += 1
        if kills == 22:
            assert life(tmp_path / "killed") == 0
            break
    assert kills >= 20
    whole, resumed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("whole", "killed"))
    for (model, history), (other_model, other_history) in zip(whole, resumed, strict=True):
        assert history == other_history and len(history["val_accuracy"]) == TRAINING["epochs"]
        assert all(torch.equal(model[key], other_model[key]) for key in model)


def test_finished_stage_is_loaded(run, train, capsys, monkeypatch):
    first = trained(run, train)
    seconds = run.seconds["a stage"]
    monkeypatch.setattr(kd._Stepper, "step", None)  # there is nothing left to train
    assert identical(first, trained(run, train)) and run.seconds["a stage"] > 0.5 * seconds
    assert "was finished before and is loaded from" in capsys.readouterr().out


def test_changed_setting_starts_afresh_says_why_and_keeps_the_old(run, train, capsys, monkeypatch):
    first = trained(run, train)
    assert not identical(first, trained(run, train, lr=1e-3))
    assert "starts afresh, since lr was 0.002 and is 0.001; a-stage-" in capsys.readouterr().out
    trained(run, train, cohort(lambda student, teacher, targets: 2 * kd.label_loss(student, teacher, targets)))
    assert "since lr was 0.001 and is 0.002, losses changed" in capsys.readouterr().out
    other = kd.Split(255 - train.images, train.targets, train.classes, train.files)
    monkeypatch.setattr(kd._Stepper, "step", None)
    assert identical(first, trained(run, train))
    with pytest.raises(TypeError):  # other images: there is something to train
        trained(run, other)
    assert "train changed" in capsys.readouterr().out


def test_number_that_a_loss_takes_from_outside_is_a_setting(run, train, capsys):
    weight = 2.0

    def weighted(student_logits, teacher_logits, targets):
        return weight * kd.label_loss(student_logits, teacher_logits, targets)

    trained(run, train, cohort(weighted), epochs=1)
    weight = 3.0  # the same code
    trained(run, train, cohort(weighted), epochs=1)
    assert "starts afresh, since losses changed" in capsys.readouterr().out


def test_size_on_disk_is_bounded(run, train):
    students = cohort()
    for lr in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3):
        trained(run, train, students := cohort(), lr=lr, epochs=1)
    files = list((run.folder / "checkpoints").iterdir())
    weights = sum(4 * kd.count_parameters(student.model) for student in students)
    assert len(files) == kd.CHECKPOINTS_KEPT and max(file.stat().st_size for file in files) < weights + 50_000  # finished: weights only


def interrupt(train, run, at_step, **changes):
    """Trains and presses the stop button in the middle of a step."""
    calls = iter(range(10**6))

    def loss(*arguments):
        if next(calls) == 4 * at_step + 1:  # four students: between the first and the second
            signal.raise_signal(signal.SIGINT)
        return kd.label_loss(*arguments)

    students = cohort(kd.label_loss)
    for student in students:
        student.loss = Quiet(loss)
    with pytest.raises(KeyboardInterrupt, match="run the cell again to continue"):
        trained(run, train, students, **changes)
    return students


class Quiet:
    """A loss whose fingerprint does not depend on what it wraps."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, *arguments):
        return self.loss(*arguments)

    def __repr__(self):
        return "quiet"


def test_interrupt_waits_for_the_step_and_can_be_continued(run, train, capsys):
    students = interrupt(train, run, at_step=7)
    assert all(len(student.history.val_loss) == 2 for student in students)  # two epochs of three steps, and usable objects
    assert kd.predict(students[0].model, train).isfinite().all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = cohort()
    for student in again:
        student.loss = Quiet(kd.label_loss)
    trained(run, train, again)
    assert "continues after step 8 of 30" in capsys.readouterr().out and identical(again, kd.fit(cohort(), train, train, **TRAINING))


def test_checkpoint_cut_at_any_length_is_set_aside(run, train, capsys):
    first, rng = trained(run, train, epochs=1), random.Random(1)
    path = next((run.folder / "checkpoints").glob("*.pt"))
    content = path.read_bytes()
    for length in [0, *(rng.randrange(len(content)) for _ in range(50))]:
        path.write_bytes(content[:length])
        assert identical(first, trained(run, train, epochs=1))
        assert "cannot be used" in capsys.readouterr().out
    aside = list(path.parent.glob("*.aside*"))
    assert len(aside) == 51 and sum(file.stat().st_size for file in aside) > len(content)  # not trusted, and not deleted


@pytest.mark.parametrize("foreign", [b"not a checkpoint", "a list", "a program"])
def test_foreign_checkpoint_is_set_aside(run, train, capsys, foreign):
    first = trained(run, train, epochs=1)
    path = next((run.folder / "checkpoints").glob("*.pt"))
    path.write_bytes(foreign) if isinstance(foreign, bytes) else torch.save([1] if foreign == "a list" else {"settings": print}, path)
    assert identical(first, trained(run, train, epochs=1)) and "set aside as" in capsys.readouterr().out


def test_full_disk_costs_the_checkpoint_and_not_the_run(run, train, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes that a file may have
    try:
        students = trained(run, train)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in capsys.readouterr().out and identical(students, kd.fit(cohort(), train, train, **TRAINING))
    assert list((run.folder / "checkpoints").iterdir()) == []


def test_student_whose_loss_is_not_finite_is_stopped_and_the_others_go_on(run, train, capsys, monkeypatch):
    monkeypatch.setattr(kd, "CHECKPOINT_SECONDS", 0)
    calls = iter(range(10**6))

    def loss(student_logits, teacher_logits, targets):
        return kd.label_loss(student_logits, teacher_logits, targets) / (0 if next(calls) == 10 else 1)

    students = cohort()
    students[1].loss = loss
    trained(run, train, students)
    why = "LeNet-5 with seed 1 was stopped: the loss was inf at step 11 of 30; its weights are those of the last good checkpoint"
    assert students[1].stopped.startswith(why)
    assert students[1].stopped in capsys.readouterr().out and kd.predict(students[1].model, train).isfinite().all()
    others = kd.fit(cohort(), train, train, **TRAINING)
    assert identical(students[:1] + students[2:], others[:1] + others[2:])
    run.save("experiment1", students, train, TRAINING)
    record = run.load("experiment1")
    assert [(s["name"], s["seed"]) for s in record["students"]] == [("LeNet-5", 0), ("small CNN", 0), ("small CNN", 1)]
    assert "Left out:** LeNet-5 with seed 1 was stopped" in kd.report_verdict(run)


def test_no_student_left_is_an_error(train):
    with pytest.raises(FloatingPointError, match="no student is left.*seed 0 was stopped: the loss was nan at step 1 of 30.*lower learning rate"):
        kd.fit(cohort(lambda *arguments: kd.label_loss(*arguments) * torch.nan)[:1], train, train, **TRAINING)


def test_out_of_memory_says_what_to_lower(train):
    def loss(*arguments):
        torch.empty(1 << 60)

    with pytest.raises(MemoryError, match=r"lower batch_size \(now 16\) or choose a smaller profile.*64 px"):
        kd.fit(cohort(loss), train, train, **TRAINING)


def test_classes_are_compared_by_name(train):
    other = kd.Split(train.images, train.targets, ["green", "red", "blue"], train.files)
    with pytest.raises(ValueError, match="val has the classes green, red, blue, but train has red, green, blue, in this order"):
        kd.fit(cohort(), train, other, **TRAINING)
    taught = kd.fit([kd.Student(SmallCNN(3), "teacher", 0)], other, other, **{**TRAINING, "epochs": 1})[0].model
    with pytest.raises(ValueError, match="the teacher has the classes green, red, blue"):
        kd.fit(cohort(), train, train, teacher=kd.freeze(taught), **TRAINING)

def test_damaged_record_is_set_aside(run, train, capsys):
    run.save("experiment1", cohort(), train, TRAINING)
    path = run.folder / "experiment1.json"
    path.write_text(path.read_text()[:200])
    assert run.load("experiment1") is None and "experiment1.json.aside1" in capsys.readouterr().out


def test_damaged_teacher_weights_are_named(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="weights.pth: not a readable state dict of ResNet-50"):
        kd.build_teacher(10, tmp_path / "weights.pth")
