"""Graphs of state dicts give what transformers gives, for tiny models with random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quernstone.importers import Graph, from_state_dict, read, write_onnx
from tests.importers.tiny import TOLERANCE, oracle

transformers = pytest.importorskip("transformers")

BERT = {
    **{"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"intermediate_size": 40, "max_position_embeddings": 20, "layer_norm_eps": 1e-5},
}
LLAMA = {
    **{"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6},
    **{"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32},
    **{"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


def bert() -> Any:
    config = transformers.BertConfig(**BERT, attn_implementation="eager")
    return _random(transformers.BertModel(config, add_pooling_layer=False))


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**LLAMA, **changes}, attn_implementation="eager")
    return _random(transformers.LlamaForCausalLM(config))


def _random(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def graph_of(model: Any) -> Graph:
    return from_state_dict(model.state_dict(), model.config.to_dict())


def sentences() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    mask[2, 1:] = 0
    return {
        "input_ids": torch.randint(0, 50, (3, 7), generator=random),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (3, 7), generator=random),
    }


def test_bert_gives_the_hidden_state_of_transformers(tmp_path: Path) -> None:
    model, inputs = bert(), sentences()
    graph = graph_of(model)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
    got = graph.run(inputs)["last_hidden_state"]
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert set(graph.constants) >= set(model.state_dict()) - {"embeddings.position_ids"}
    _exported(graph, inputs, got, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 6}, {"tie_word_embeddings": True}, {"head_dim": 6}],
    ids=["grouped", "plain", "tied", "narrow"],
)
def test_llama_gives_the_logits_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model, ids = llama(**changes), sentences()["input_ids"]
    graph = graph_of(model)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    got = graph.run({"input_ids": ids})["logits"]
    torch.testing.assert_close(got, want, **TOLERANCE)
    _exported(graph, {"input_ids": ids}, got, tmp_path)


def _exported(graph: Graph, inputs: dict[str, Tensor], want: Tensor, folder: Path) -> None:
    """The graph in an ONNX file, read from there, and in a safetensors file, is the same."""
    path = folder / "a.onnx"
    write_onnx(graph, path)
    (got,) = oracle(path, {name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(got, want, **TOLERANCE)
    (again,) = read(path).run(inputs).values()
    torch.testing.assert_close(again, want, **TOLERANCE)
    graph.save(folder / "a.safetensors")
    (again,) = read(folder / "a.safetensors").run(inputs).values()
    torch.testing.assert_close(again, want, rtol=0, atol=0)


def test_a_folder_of_transformers_is_read(tmp_path: Path) -> None:
    model, inputs = bert(), sentences()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        read(tmp_path).run(inputs), graph_of(model).run(inputs), rtol=0, atol=0
    )


def test_a_saved_state_dict_is_loaded_by_transformers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, inputs = bert(), sentences()
    graph = graph_of(model)
    name = "encoder.layer.1.output.dense.weight"
    graph = graph.with_constants({name: graph.constants[name] / 2})
    graph.save(tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    other = bert()
    other.load_state_dict({k: v for k, v in state.items() if k in other.state_dict()})
    with torch.no_grad():
        want = other(**inputs).last_hidden_state
    torch.testing.assert_close(graph.run(inputs)["last_hidden_state"], want, **TOLERANCE)


def test_a_gguf_file_gives_the_logits_of_the_model_that_transformers_reads_from_it(
    tmp_path: Path,
) -> None:
    gguf = pytest.importorskip("gguf")
    model, ids = llama(hidden_size=48), sentences()["input_ids"]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_vocab_size(50)
    writer.add_context_length(32)
    writer.add_embedding_length(48)
    writer.add_block_count(2)
    writer.add_feed_forward_length(40)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(8)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf")
    with torch.no_grad():
        want = other(input_ids=ids).logits
    got = read(tmp_path / "a.gguf").run({"input_ids": ids})["logits"]
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_tied_embeddings_are_one_constant() -> None:
    graph = graph_of(llama(tie_word_embeddings=True))
    assert graph["lm_head"].input("weight") == "model.embed_tokens.weight"
    assert "lm_head.weight" not in graph.constants


def test_a_module_of_a_graph_has_the_names_of_the_state_dict() -> None:
    model = bert()
    names = {name for name, _ in graph_of(model).module().named_parameters()}
    # Position embeddings are cut, not looked up: a constant, and no layer.
    assert names == {n for n, _ in model.named_parameters()} - {
        "embeddings.position_embeddings.weight"
    }


def test_half_precision_becomes_fp32() -> None:
    model = bert()
    halves = {name: value.bfloat16() for name, value in model.state_dict().items()}
    graph = from_state_dict(halves, model.config.to_dict())
    assert graph.weight("embeddings.word_embeddings").dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected one of"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_size": 48}, r"word_embeddings.weight.*: got shape \(50, 24\), expected \(50, 48"),
        ({"num_attention_heads": 5}, "hidden_size is 24, expected a multiple of 5"),
        ({"num_hidden_layers": 3}, r"'encoder.layer.2.attention.self.query.weight' is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    model = bert()
    with pytest.raises(ValueError, match=message):
        from_state_dict(model.state_dict(), {**model.config.to_dict(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_a_llama_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"config: (attention_bias|mlp_bias|rope_type) is "):
        from_state_dict(model.state_dict(), {**model.config.to_dict(), **change})


def test_weights_that_are_not_finite_are_refused_by_their_layer() -> None:
    model = bert()
    name = "encoder.layer.0.intermediate.dense"
    state = {**model.state_dict(), f"{name}.bias": torch.full((40,), torch.nan)}
    with pytest.raises(ValueError, match=f"linear '{name}': bias .*: 40 of 40 are nan"):
        from_state_dict(state, model.config.to_dict())
