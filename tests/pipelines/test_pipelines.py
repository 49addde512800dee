"""The pipelines that ship, from data to gated engines, at a small size: every stage done, and the engines answer as torch does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_models import bert_folder, image_folder, mnist_folder, vit_folder
from tiny_pipeline import mpdeploy

from mpdeploy.artifact import Golden
from mpdeploy.config import load_pipeline
from mpdeploy.run_dir import RunDir

PIPELINES = Path(__file__).parents[2] / "pipelines"
ENGINES = ("onnxruntime", "openvino", "tensorrt-rtx")


def run(tmp_path: Path, name: str, *settings: str) -> tuple[RunDir, dict]:
    """Run a pipeline; it ends well, or with a gate that too few samples or too little training cannot pass."""
    engines = [part for engine in ENGINES for part in ("--engine", engine)]
    options = [part for setting in settings for part in ("--set", setting)]
    process = mpdeploy(
        "train-and-export",
        PIPELINES / f"{name}.py",
        "--run",
        tmp_path / "run",
        "--json",
        *engines,
        *options,
        timeout=500,
    )
    assert process.returncode in (0, 10), process.stderr
    directory = RunDir.open(tmp_path / "run")
    assert {record.status for record in directory.records().values()} == {"done"}, process.stderr
    return directory, json.loads((tmp_path / "run" / "gate.json").read_text())


def check_engines(gate: dict) -> None:
    """Drift was measured at every place that runs here and passed; what is built for a GPU waits for one."""
    for at, place in gate["places"].items():
        if at == "engine/tensorrt-rtx":
            assert at in gate["unvalidated"]
        elif at != "parity":
            assert place["drift"]["logits"]["rel_l2"] < 2e-2, at
    drifts = [item for item in gate["verdicts"] if item["metric"] == "rel_l2" and item["at"] not in gate["unvalidated"]]
    assert {item["verdict"] for item in drifts} == {"pass"}


SMALL = ("train.epochs=1", "validation.latency_samples=20")


@pytest.mark.slow
def test_mnist_cnn_on_idx_files(tmp_path):
    folder = mnist_folder(tmp_path / "mnist", suffix=".gz")
    directory, gate = run(tmp_path, "mnist_cnn", f"data.folder={folder}", "train.epochs=2", SMALL[1])
    check_engines(gate)
    assert directory.record("20-export").report["data"]["source"] == "mnist-custom"
    assert gate["places"]["onnx"]["scores"]["mean"] > 0.8, "two epochs are enough to read most digits"
    golden = Golden.load(directory.path / "20-export" / "golden.npz")
    assert golden.dataset.ids.min() >= 1_000_000, "the gate's images are those of the test file"


@pytest.mark.slow
def test_text_classifier_on_docstrings(tmp_path):
    bert = bert_folder(tmp_path / "bert")
    directory, gate = run(
        tmp_path, "text_classifier", f"data.model_folder={bert}", "data.limit=300", "data.max_length=32", *SMALL
    )
    check_engines(gate)
    model = directory.artifact("20-export", "model")
    assert [str(spec) for spec in model.inputs] == [
        "input_ids: int64[batch, sequence]", "attention_mask: int64[batch, sequence]",
    ]  # fmt: skip
    assert list(directory.record("20-export").report["parity_rel_l2"]) == ["1x32", "2x32", "7x17", "7x32", "2x1"]
    assert directory.record("20-export").report["data"]["source"] == "python-docstrings"
    texts = json.loads(directory.artifact("50-validate", "samples").path.read_text())["texts"]
    assert texts
    assert all(len(text.split()) > 1 and "[PAD]" not in text for text in texts.values())


@pytest.mark.slow
def test_finetune_hf_on_pairs_of_sentences(tmp_path):
    bert, folder = bert_folder(tmp_path / "bert"), tmp_path / "glue"
    folder.mkdir()
    for name, begin, count in (("train", 0, 120), ("dev", 120, 40)):
        rows = [
            f"read file {n}\tthe file is {'old' if n % 3 == 0 else 'new'}\t{n % 3}" for n in range(begin, begin + count)
        ]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
    directory, gate = run(
        tmp_path, "finetune_hf", f"data.model_folder={bert}", f"data.folder={folder}", "data.max_length=32", *SMALL
    )
    check_engines(gate)
    model = directory.artifact("20-export", "model")
    assert [spec.name for spec in model.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert model.outputs[0].shape == ("batch", 3), "three classes, where the folder's own head has two"


@pytest.mark.slow
def test_finetune_hf_on_images(tmp_path):
    vit, folder = vit_folder(tmp_path / "vit"), image_folder(tmp_path / "images", count=200)
    directory, gate = run(
        tmp_path,
        "finetune_hf",
        f"data.model_folder={vit}",
        f"data.folder={folder}",
        f"data.cache_folder={tmp_path}/cache",
        *SMALL,
    )
    check_engines(gate)
    assert [str(spec) for spec in directory.artifact("20-export", "model").inputs] == [
        "image: float32[batch, 3, 16, 16]"
    ]


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.py")), ids=lambda path: path.stem)
def test_every_pipeline_file_is_a_pipeline_of_its_own_name(path):
    assert load_pipeline(path).name == path.stem


def test_mnist_is_made_of_digits_that_look_like_mnist(tmp_path):
    from mpdeploy.train.data.idx import read_idx

    images, _ = read_idx(mnist_folder(tmp_path) / "train-images-idx3-ubyte", axes=3)
    assert images.shape == (1437, 28, 28)
    assert (images[:, :2].max(), images.max()) == (0, 255)
    assert np.array_equal(images[:, 2::3, 2::3][:, :8, :8], images[:, 3::3, 3::3][:, :8, :8]), "each pixel is tripled"
