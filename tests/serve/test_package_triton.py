"""A model repository says of a model what its engine can do, and one that does not is caught before it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packaged import IDS, IMAGE, LOGITS, TEXTS, VECTORS, model

from mpdeploy.artifact import TensorSpec
from mpdeploy.engines.base import ShapeRange
from mpdeploy.errors import ConfigError, UsageError
from mpdeploy.serve.package.batching import batching_of, profile_from_sidecar
from mpdeploy.serve.package.check import check_repository
from mpdeploy.serve.package.model_config import ENUMS, FIELDS, check_with_client, config_text, config_values
from mpdeploy.serve.package.target_triton import read_labels, readme
from mpdeploy.serve.package.triton import TritonOptions, config_of, names_of, write_repository


def repository(folder: Path, *models, options: TritonOptions | None = None):
    """Write a repository of models that `mpdeploy package` could have chosen."""
    names = names_of(models, "digits")
    write_repository(folder, names, options or TritonOptions())
    return names


# -- the table of Triton's message -------------------------------------------------------------------------------------


def test_the_table_of_fields_is_that_of_tritons_own_client():
    pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    for name, fields in FIELDS.items():
        theirs = pb2.DESCRIPTOR.message_types_by_name[name.split(".")[0]]
        for part in name.split(".")[1:]:
            theirs = theirs.nested_types_by_name[part]
        for number, field, kind in fields:
            found = theirs.fields_by_name[field]
            assert (found.number, found.is_repeated) == (number, kind[0] in "[{"), f"{name}.{field}"
            inner = found.message_type
            if kind[0] == "{":
                assert inner.GetOptions().map_entry
                inner = inner.fields_by_name["value"].message_type
            wanted = kind.strip("[]{}")
            if inner is not None or found.enum_type is not None:
                assert (inner or found.enum_type).full_name == f"inference.{wanted}"
            else:
                assert found.type == getattr(found, f"TYPE_{wanted.upper()}"), f"{name}.{field}"
    for name, members in ENUMS.items():
        outer, _, last = name.rpartition(".")
        theirs = (
            pb2.DESCRIPTOR.message_types_by_name[outer].enum_types_by_name[last]
            if outer
            else pb2.DESCRIPTOR.enum_types_by_name[last]
        )
        assert [(value.name, value.number) for value in theirs.values] == [(m, i) for i, m in enumerate(members)]


def test_a_field_that_triton_does_not_have_cannot_be_written():
    with pytest.raises(ConfigError, match="max_batch"):
        config_text({"name": "x", "max_batch": 4})


def test_a_text_with_an_unknown_field_is_not_read():
    with pytest.raises(ConfigError, match="preferred_batch_sizes"):
        config_values("dynamic_batching { preferred_batch_sizes: 4 }", where="config.pbtxt")


# -- what a configuration says -----------------------------------------------------------------------------------------


def test_a_plan_gets_its_profiles_sizes_graphs_warm_up_and_a_gpu(tmp_path):
    config = config_of("digits", model(tmp_path, "tensorrt"), TritonOptions())
    assert config["max_batch_size"] == 32
    assert config["dynamic_batching"]["preferred_batch_size"] == [8, 32]
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 1024
    assert [spec["batch_size"] for spec in config["optimization"]["cuda"]["graph_spec"]] == [1, 8, 32]
    assert [sample["batch_size"] for sample in config["model_warmup"]] == [1, 8, 32]
    assert config["instance_group"] == [{"kind": "KIND_GPU", "count": 1, "profile": ["0"]}]
    assert config["input"] == [{"name": "image", "data_type": "TYPE_FP32", "dims": [1, 8, 8]}]


def test_an_onnx_model_runs_where_it_was_judged_and_batches_greedily(tmp_path):
    config = config_of("digits", model(tmp_path, "onnx"), TritonOptions())
    assert config["instance_group"] == [{"kind": "KIND_CPU", "count": 1}]
    assert "preferred_batch_size" not in config["dynamic_batching"]
    assert "optimization" not in config


def test_lengths_that_vary_are_warmed_up_at_both_ends_and_the_smaller_batch_limits(tmp_path):
    config = config_of("texts", model(tmp_path, "onnx", IDS, VECTORS, TEXTS), TritonOptions())
    assert config["max_batch_size"] == 16
    assert [tensor["dims"] for tensor in config["input"]] == [[-1], [-1]]
    samples = {item["name"]: (item["batch_size"], item["inputs"]["ids"]["dims"]) for item in config["model_warmup"]}
    assert samples == {
        "1 x best": (1, [64]), "8 x best": (8, [64]), "16 x best": (16, [64]), "1 x smallest": (1, [4]), "16 x largest": (16, [256]),
    }  # fmt: skip
    warm = config["model_warmup"][0]["inputs"]
    assert warm["ids"]["zero_data"], "token 0 exists in every vocabulary; a random number need not"
    assert warm["mask"]["random_data"]


def several(*parts: ShapeRange) -> dict[str, ShapeRange]:
    """The profile of a plan that was built with several."""
    sidecar = {
        "profile": {"image": ShapeRange.joined(parts).to_json()},
        "profiles": {"image": [part.to_json() for part in parts]},
    }
    return profile_from_sidecar(sidecar)


def test_a_plan_with_several_profiles_loads_them_all_and_prefers_their_sizes(tmp_path):
    small = ShapeRange((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8))
    large = ShapeRange((1, 1, 8, 8), (16, 1, 8, 8), (32, 1, 8, 8))
    plan = model(tmp_path, "tensorrt", profile=several(small, large))
    config = config_of("digits", plan, TritonOptions())
    assert config["instance_group"][0]["profile"] == ["0", "1"]
    assert config["max_batch_size"] == 32
    assert config["dynamic_batching"]["preferred_batch_size"] == [2, 4, 16, 32]
    assert [spec["batch_size"] for spec in config["optimization"]["cuda"]["graph_spec"]] == [1, 2, 4, 16, 32]
    check_repository(tmp_path, repository(tmp_path, plan))


def test_profiles_for_different_lengths_share_the_smaller_batch():
    inputs = (TensorSpec("image", "float32", ("batch", "length")),)
    short, long = ShapeRange((1, 1), (8, 32), (32, 64)), ShapeRange((1, 64), (2, 256), (4, 512))
    found = batching_of(inputs, VECTORS, several(short, long), where="m")
    assert found.max_batch == 4, "32 samples of 512 fit no profile"
    assert found.fits({"image": [4, 512]})
    assert found.fits({"image": [32, 64]})
    assert not found.fits({"image": [32, 512]})


def test_a_model_without_a_batch_axis_is_not_batched(tmp_path):
    inputs, outputs = (TensorSpec("x", "float64", (3, 4)),), (TensorSpec("y", "bool", ()),)
    config = config_of("fixed", model(tmp_path, "onnx", inputs, outputs, {}), TritonOptions())
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert config["input"][0]["dims"] == [3, 4]
    assert config["output"][0] == {"name": "y", "data_type": "TYPE_BOOL", "dims": [1], "reshape": {"shape": []}}


@pytest.mark.parametrize(
    ("inputs", "outputs", "batched"),
    [
        (IMAGE, LOGITS, True),
        (IMAGE, (TensorSpec("logits", "float32", ("other", 10)),), False),
        (IMAGE, (TensorSpec("mean", "float32", (10,)),), False),
        (IMAGE, (TensorSpec("loss", "float32", ()),), False),
    ],
)
def test_a_batch_axis_is_one_symbol_on_every_tensor(inputs, outputs, batched):
    shapes = {"image": ShapeRange((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}
    assert (batching_of(inputs, outputs, shapes, where="m").max_batch > 0) is batched


def test_a_profile_that_begins_above_one_sample_is_refused():
    shapes = {"image": ShapeRange((4, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}
    with pytest.raises(ConfigError, match="begins at 4 samples"):
        batching_of(IMAGE, LOGITS, shapes, where="m")


def test_a_tensor_of_unknown_rank_is_refused():
    with pytest.raises(ConfigError, match="number of axes of 'y'"):
        batching_of(IMAGE, (TensorSpec("y", "float32", None),), {}, where="m")


def test_a_dtype_that_triton_does_not_have_is_refused(tmp_path):
    inputs = (TensorSpec("z", "complex64", (2,)),)
    with pytest.raises(ConfigError, match="complex64"):
        config_of("m", model(tmp_path, "onnx", inputs, LOGITS[:0], {}), TritonOptions())


# -- the repository ----------------------------------------------------------------------------------------------------


def test_a_plan_has_its_onnx_beside_it_and_a_sidecar(tmp_path):
    names = repository(tmp_path, model(tmp_path, "tensorrt"), model(tmp_path, "onnx"))
    assert list(names) == ["digits", "digits_onnx"]
    assert (tmp_path / "digits/1/model.plan").is_file()
    assert (tmp_path / "digits_onnx/1/model.onnx").is_file()
    sidecar = json.loads((tmp_path / "digits/1/model.plan.json").read_text())
    assert (sidecar["library_version"], sidecar["device"]["sm"]) == ("11.4.0.106", 89)
    assert check_repository(tmp_path, names)["profiles"] == "kept"
    assert "NVIDIA L4 with TensorRT 11.4.0.106" in readme(names)


def test_the_text_is_what_tritons_own_client_reads(tmp_path):
    pytest.importorskip("tritonclient.grpc.model_config_pb2")
    for name in repository(tmp_path, model(tmp_path, "tensorrt"), model(tmp_path, "onnx")):
        assert check_with_client((tmp_path / name / "config.pbtxt").read_text(), where=name)


def test_labels_go_to_the_output_they_fit(tmp_path):
    labels = tmp_path / "names.txt"
    labels.write_text("\n".join("abcdefghij") + "\n")
    options = TritonOptions(labels=read_labels(labels))
    names = repository(tmp_path, model(tmp_path, "onnx"), options=options)
    check_repository(tmp_path, names)
    assert (tmp_path / "digits/labels.txt").read_text().splitlines() == list("abcdefghij")
    assert 'label_filename: "labels.txt"' in (tmp_path / "digits/config.pbtxt").read_text()


def test_labels_that_fit_no_output_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="3 labels"):
        config_of("digits", model(tmp_path, "onnx"), TritonOptions(labels=("a", "b", "c")))


@pytest.mark.parametrize("content", ["", "a\n\nb\n"])
def test_a_label_file_with_a_hole_is_refused(tmp_path, content):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(UsageError, match="empty line"):
        read_labels(tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("max_batch_size: 32", "max_batch_size: 64", "max_batch_size is 64, the profile ends at 32"),
        ("max_batch_size: 32", "", "max_batch_size is 0 and the model has a batch axis"),
        ("preferred_batch_size: [8, 32]", "preferred_batch_size: [8, 48]", "preferred batch size 48"),
        ("dims: [1, 8, 8]", "dims: [1, 8, 9]", "has the axes [1, 8, 9]"),
        ("data_type: TYPE_FP32", "data_type: TYPE_FP16", "is TYPE_FP16"),
        ('name: "image"', 'name: "picture"', "inputs are ['picture']"),
        ('name: "digits"', 'name: "other"', "its folder is 'digits'"),
        ("batch_size: 8\n", "batch_size: 99\n", "gives {'image': [99, 1, 8, 8]}, no profile takes that"),
        ('backend: "tensorrt"', 'backend: "onnxruntime"', "does not run a tensorrt file"),
        ("KIND_GPU", "KIND_CPU", "instances are KIND_CPU"),
        ('profile: "0"', 'profile: "1"', "the engine has 0"),
        ("model.plan", "model.engine", "no file 'model.engine'"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_its_engine_is_caught(tmp_path, before, after, fault):
    names = repository(tmp_path, model(tmp_path, "tensorrt"))
    path = tmp_path / "digits/config.pbtxt"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(ConfigError) as caught:
        check_repository(tmp_path, names)
    assert fault in caught.value.message


def test_another_file_in_the_engines_place_is_caught(tmp_path):
    names = repository(tmp_path, model(tmp_path, "tensorrt"))
    (tmp_path / "digits/1/model.plan").write_bytes(b"another plan")
    (tmp_path / "digits/1/model.plan.json").unlink()
    with pytest.raises(ConfigError, match="holds another file") as caught:
        check_repository(tmp_path, names)
    assert "no sidecar" in caught.value.message
