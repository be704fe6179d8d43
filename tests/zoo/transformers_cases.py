"""Model types of transformers in small configurations, with random weights: nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from cases import ZooCase
from torch import Tensor, nn

Inputs = Callable[[], dict[str, Any]]
_VOCAB = 160
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


# Inputs


def _ids(length: int = 12) -> Tensor:
    return torch.randint(3, _VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def tokens(length: int = 12) -> dict[str, Any]:
    return {"input_ids": _ids(length)}


def masked(length: int = 12) -> dict[str, Any]:
    """Tokens of which the second row is padded."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {"input_ids": _ids(length), "attention_mask": mask}


def seq2seq() -> dict[str, Any]:
    return {"input_ids": _ids(12), "decoder_input_ids": _ids(8)}


def masked_seq2seq() -> dict[str, Any]:
    """With the encoder's mask: some models only make one themselves outside of a trace."""
    return {**masked(), "decoder_input_ids": _ids(8)}


def image(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": _noise(2, 3, size, size)}


def video(frames: int = 4, size: int = 32) -> dict[str, Any]:
    return {"pixel_values": _noise(2, frames, 3, size, size)}


def pixels_and_mask(size: int = 64) -> dict[str, Any]:
    return {**image(size), "pixel_mask": torch.ones(2, size, size, dtype=torch.long)}


def wave(length: int = 800) -> dict[str, Any]:
    return {"input_values": _noise(2, length)}


def sound(length: int = 640) -> dict[str, Any]:
    return {"input_values": _noise(2, 1, length)}


def spectrum(name: str, *shape: int, decoder: int = 0) -> dict[str, Any]:
    """A spectrogram, and tokens for the decoder if there is one."""
    given: dict[str, Any] = {name: _noise(2, *shape)}
    return {**given, "decoder_input_ids": _ids(decoder)} if decoder else given


def text_and_image(length: int = 8, size: int = 32) -> dict[str, Any]:
    return {**masked(length), **image(size)}


def text_with_image_tokens(count: int, token: int = 150, size: int = 32) -> dict[str, Any]:
    """Tokens in which ``count`` places stand for the image's features."""
    ids = _ids(count + 6) % 100 + 3
    ids[:, 2 : 2 + count] = token
    return {"input_ids": ids, **image(size)}


def boxes(scale: float = 1) -> dict[str, Any]:
    """Tokens and their places on a page: whole numbers, or parts of its width with a scale below 1."""
    corners = torch.randint(0, 40, (2, 12, 2), generator=torch.Generator().manual_seed(5))
    return {**tokens(), "bbox": torch.cat([corners, corners + 5], -1) * scale}


def regions() -> dict[str, Any]:
    return {**masked(), "visual_feats": _noise(2, 5, 20), "visual_pos": _noise(2, 5, 4).sigmoid()}


def series() -> dict[str, Any]:
    return {"past_values": _noise(2, 32, 3)}


def moments() -> dict[str, Any]:
    """A time series with its time features, and the future it is trained on."""
    past = {"past_values": _noise(2, 23), "past_time_features": _noise(2, 23, 2)}
    future = {"future_values": _noise(2, 6), "future_time_features": _noise(2, 6, 2)}
    return {**past, "past_observed_mask": torch.ones(2, 23), **future}


def trajectory() -> dict[str, Any]:
    given = {"states": _noise(2, 4, 6), "actions": _noise(2, 4, 3), "returns_to_go": _noise(2, 4, 1)}
    return {**given, "timesteps": torch.arange(4).repeat(2, 1), "attention_mask": torch.ones(2, 4)}


# Configurations


def _small(**config: Any) -> dict[str, Any]:
    """A transformer by the names that most configurations use."""
    usual = {
        "vocab_size": _VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return {**usual, **_IDS, "use_cache": False, **config}


def _decoder(**config: Any) -> dict[str, Any]:
    return _small(**{"num_key_value_heads": 2, **config})


def _experts(**config: Any) -> dict[str, Any]:
    """A mixture of experts, computed by a batched product: the loop over the experts that were hit has no graph."""
    few = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _decoder(**{"experts_implementation": "batched_mm", **few, **config})


def _latent(**config: Any) -> dict[str, Any]:
    """Experts after multi-head latent attention."""
    heads = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
    return _experts(
        **{**heads, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, **config}
    )


def _bart(**config: Any) -> dict[str, Any]:
    """Encoder and decoder by the names of BART's configuration."""
    sizes = {"d_model": 48, "max_position_embeddings": 64, "vocab_size": _VOCAB, "decoder_start_token_id": 2}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 64, f"{part}_layerdrop": 0.0}
    return {**sizes, **_IDS, "use_cache": False, **config}


def _t5(**config: Any) -> dict[str, Any]:
    sizes = {"vocab_size": _VOCAB, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return {**sizes, "decoder_start_token_id": 0, **_IDS, "use_cache": False, **config}


def _vision(**config: Any) -> dict[str, Any]:
    return _small(**{"image_size": 32, "patch_size": 8, **config})


def _stages(**config: Any) -> dict[str, Any]:
    """A pyramid of stages, each half as wide in space as the last."""
    return {"image_size": 32, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, **config}


def _wav2vec2(**config: Any) -> dict[str, Any]:
    sizes = {"conv_dim": (16, 24), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_conv_pos_embeddings": 8}
    still = {"layerdrop": 0.0, "apply_spec_augment": False}  # both draw by NumPy or branch in Python while training
    return _small(**{**sizes, **still, "num_conv_pos_embedding_groups": 4, "vocab_size": 32, **config})


def _towers(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, projection_dim: int = 24, **config: Any
) -> dict[str, Any]:
    """Two encoders with a config each."""
    return {
        "text_config": _small(projection_dim=projection_dim, **(text or {})),
        "vision_config": _vision(projection_dim=projection_dim, **(vision or {})),
        "projection_dim": projection_dim,
        **config,
    }


def _detr(**config: Any) -> dict[str, Any]:
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}
    backbone |= {"layer_type": "basic", "out_features": ["stage4"]}
    sizes = _bart(num_queries=6, num_labels=5, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
    return {**sizes, "backbone_config": backbone, "backbone_kwargs": None, **config}


# Cases


def _build(cls: str, config: dict[str, Any], config_class: str | None) -> nn.Module:
    import transformers

    model_class = getattr(transformers, cls)
    made = getattr(transformers, config_class) if config_class else model_class.config_class
    return model_class(made(**config))


def _case(name: str, cls: str, family: str, inputs: Inputs, config: dict[str, Any], by: str | None = None) -> ZooCase:
    """by: the class of the configuration, where the model's class does not tell."""
    return ZooCase(name, "transformers", family, functools.partial(_build, cls, config, by), inputs)


def _table(family: str, *rows: tuple[Any, ...]) -> list[ZooCase]:
    return [_case(name, cls, family, inputs, config, *more) for name, cls, inputs, config, *more in rows]


def _with(inputs: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> Inputs:
    return functools.partial(inputs, *args, **kwargs)


_EAGER = {"attn_implementation": "eager"}
_GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": _VOCAB, "use_cache": False, **_IDS}
_MAMBA = {"state_size": 8, "conv_kernel": 4, "time_step_rank": 4}


# fmt: off


def _decoders() -> list[ZooCase]:
    return _table(
        "language decoder",
        ("gpt2", "GPT2LMHeadModel", tokens, _GPT),
        ("openai-gpt", "OpenAIGPTLMHeadModel", tokens, _GPT),
        ("gpt_bigcode", "GPTBigCodeForCausalLM", tokens, _GPT | _EAGER),
        ("gptj", "GPTJForCausalLM", tokens, _GPT | {"rotary_dim": 8}),
        ("codegen", "CodeGenForCausalLM", tokens, _GPT | {"rotary_dim": 8, "n_ctx": 64}),
        ("ctrl", "CTRLLMHeadModel", tokens, _GPT | {"dff": 64}),
        ("imagegpt", "ImageGPTForCausalImageModeling", tokens, _GPT),
        ("gpt_neo", "GPTNeoForCausalLM", tokens, _small(num_layers=2, num_heads=4, attention_types=[[["global",
            "local"], 1]], window_size=4)),
        ("gpt_neox", "GPTNeoXForCausalLM", masked, _small(**_EAGER)),
        ("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", tokens, _small()),
        ("llama", "LlamaForCausalLM", masked, _decoder()),
        ("mistral", "MistralForCausalLM", tokens, _decoder(sliding_window=6, **_EAGER)),
        ("ministral", "MinistralForCausalLM", tokens, _decoder(sliding_window=6, head_dim=12)),
        ("qwen2", "Qwen2ForCausalLM", tokens, _decoder(tie_word_embeddings=True)),
        ("qwen3", "Qwen3ForCausalLM", tokens, _decoder(head_dim=12, **_EAGER)),
        ("gemma", "GemmaForCausalLM", tokens, _decoder(head_dim=12)),
        ("gemma2", "Gemma2ForCausalLM", tokens, _decoder(head_dim=12, sliding_window=6, **_EAGER)),
        ("gemma3_text", "Gemma3ForCausalLM", tokens, _decoder(head_dim=12, sliding_window=6)),
        ("phi", "PhiForCausalLM", tokens, _small(**_EAGER)),
        ("phi3", "Phi3ForCausalLM", tokens, _decoder()),
        ("opt", "OPTForCausalLM", masked, _small(ffn_dim=64, word_embed_proj_dim=24)),
        ("bloom", "BloomForCausalLM", masked, _small(n_layer=2, n_head=4)),
        ("falcon", "FalconForCausalLM", tokens, _small(alibi=True)),
        ("mpt", "MptForCausalLM", tokens, _small(d_model=48, n_heads=4, n_layers=2, max_seq_len=64)),
        ("stablelm", "StableLmForCausalLM", tokens, _decoder(partial_rotary_factor=0.5, head_dim=12, **_EAGER,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})),
        ("olmo", "OlmoForCausalLM", tokens, _decoder()),
        ("olmo2", "Olmo2ForCausalLM", tokens, _decoder(**_EAGER)),
        ("olmo3", "Olmo3ForCausalLM", tokens, _decoder(sliding_window=6)),
        ("cohere", "CohereForCausalLM", tokens, _decoder()),
        ("cohere2", "Cohere2ForCausalLM", tokens, _decoder(sliding_window=6, **_EAGER)),
        ("starcoder2", "Starcoder2ForCausalLM", tokens, _decoder()),
        ("granite", "GraniteForCausalLM", tokens, _decoder(**_EAGER)),
        ("glm", "GlmForCausalLM", tokens, _decoder(head_dim=12)),
        ("glm4", "Glm4ForCausalLM", tokens, _decoder(head_dim=12)),
        ("helium", "HeliumForCausalLM", tokens, _decoder(head_dim=12)),
        ("nemotron", "NemotronForCausalLM", tokens, _decoder(head_dim=12)),
        ("persimmon", "PersimmonForCausalLM", tokens, _small()),
        ("smollm3", "SmolLM3ForCausalLM", tokens, _decoder()),
        ("exaone4", "Exaone4ForCausalLM", tokens, _decoder(sliding_window=6)),
        ("ernie4_5", "Ernie4_5ForCausalLM", tokens, _decoder(head_dim=12)),
        ("arcee", "ArceeForCausalLM", tokens, _decoder()),
        ("apertus", "ApertusForCausalLM", tokens, _decoder()),
        ("bitnet", "BitNetForCausalLM", tokens, _decoder()),
        ("diffllama", "DiffLlamaForCausalLM", tokens, _decoder(**_EAGER)),
        ("biogpt", "BioGptForCausalLM", tokens, _small(layerdrop=0.0)),
        ("xglm", "XGLMForCausalLM", tokens, _small(d_model=48, num_layers=2, attention_heads=4, ffn_dim=64)),
        ("modernbert-decoder", "ModernBertDecoderForCausalLM", tokens, _small(cls_token_id=1, sep_token_id=2,
            local_attention=6)),
    )


def _mixtures() -> list[ZooCase]:
    return _table(
        "mixture of experts",
        ("mixtral", "MixtralForCausalLM", tokens, _experts()),
        ("qwen2_moe", "Qwen2MoeForCausalLM", tokens, _experts(shared_expert_intermediate_size=32)),
        ("qwen3_moe", "Qwen3MoeForCausalLM", tokens, _experts(head_dim=12, experts_implementation="grouped_mm")),
        ("olmoe", "OlmoeForCausalLM", tokens, _experts()),
        ("phimoe", "PhimoeForCausalLM", tokens, _experts()),
        ("granitemoe", "GraniteMoeForCausalLM", tokens, _experts()),
        ("gpt_oss", "GptOssForCausalLM", tokens, _experts(head_dim=12, sliding_window=6)),
        ("dbrx", "DbrxForCausalLM", tokens, _small(d_model=48, n_heads=4, n_layers=2, max_seq_len=64,
            experts_implementation="batched_mm", attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta":
            10000.0}, ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 48})),
        ("deepseek_v2", "DeepseekV2ForCausalLM", tokens, _latent(first_k_dense_replace=1, topk_method="greedy",
            n_shared_experts=1)),
        ("deepseek_v3", "DeepseekV3ForCausalLM", tokens, _latent(first_k_dense_replace=1, num_mtp_layers=0)),
        ("glm4_moe", "Glm4MoeForCausalLM", tokens, _latent(first_k_dense_replace=1, head_dim=12)),
        ("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", tokens, _experts(moe_num_experts=4, moe_k=2)),
        ("jetmoe", "JetMoeForCausalLM", tokens, _experts(kv_channels=12)),
    )


def _recurrent() -> list[ZooCase]:
    return _table(
        "state space or recurrent",
        ("mamba", "MambaForCausalLM", tokens, _small(**_MAMBA)),
        ("mamba2", "Mamba2ForCausalLM", tokens, _small(**_MAMBA, num_heads=8, head_dim=12, n_groups=2, chunk_size=4)),
        ("falcon_mamba", "FalconMambaForCausalLM", tokens, _small(**_MAMBA)),
        ("rwkv", "RwkvForCausalLM", tokens, _small(context_length=64, attention_hidden_size=48)),
        ("jamba", "JambaForCausalLM", tokens, _experts(attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)),
        ("bamba", "BambaForCausalLM", tokens, _decoder(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=12,
            mamba_d_state=8, mamba_chunk_size=4)),
        ("zamba2", "Zamba2ForCausalLM", tokens, _small(layers_block_type=["mamba", "hybrid"], mamba_d_state=8,
            n_mamba_heads=8, chunk_size=4, adapter_rank=8, use_mamba_kernels=False)),
        ("falcon_h1", "FalconH1ForCausalLM", tokens, _decoder(mamba_d_ssm=96, mamba_n_heads=8, mamba_d_head=12,
            mamba_d_state=8, mamba_chunk_size=4, head_dim=12)),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", tokens, _decoder(lru_width=48, attention_window_size=8,
            block_types=["recurrent", "attention"])),
        ("lfm2", "Lfm2ForCausalLM", tokens, _decoder(layer_types=["conv", "full_attention"], block_ff_dim=64)),
        ("qwen3_next", "Qwen3NextForCausalLM", tokens, _experts(head_dim=12, shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=8,
            linear_num_key_heads=2, linear_num_value_heads=4, **_EAGER)),
    )


def _encoders() -> list[ZooCase]:
    return _table(
        "encoder",
        ("bert", "BertForMaskedLM", masked, _small()),
        ("bert-generation", "BertGenerationDecoder", tokens, _small(is_decoder=True)),
        ("roberta", "RobertaForMaskedLM", masked, _small(**_EAGER)),
        ("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM", tokens, _small()),
        ("xlm-roberta", "XLMRobertaForMaskedLM", masked, _small()),
        ("xlm-roberta-xl", "XLMRobertaXLForMaskedLM", tokens, _small()),
        ("xmod", "XmodForMaskedLM", tokens, _small(languages=["en_XX"], default_language="en_XX")),
        ("camembert", "CamembertForMaskedLM", tokens, _small()),
        ("electra", "ElectraForMaskedLM", masked, _small(embedding_size=24)),
        ("deberta", "DebertaForMaskedLM", masked, _small(relative_attention=True, pos_att_type=["c2p", "p2c"],
            max_relative_positions=16, legacy=False)),
        ("deberta-v2", "DebertaV2ForMaskedLM", masked, _small(relative_attention=True, pos_att_type=["c2p", "p2c"],
            position_buckets=8, conv_kernel_size=3, conv_act="gelu", legacy=False)),
        ("albert", "AlbertForMaskedLM", masked, _small(embedding_size=24, num_hidden_groups=1)),
        ("distilbert", "DistilBertForMaskedLM", masked, _small(dim=48, n_layers=2, n_heads=4, hidden_dim=64)),
        ("mpnet", "MPNetForMaskedLM", masked, _small()),
        ("xlm", "XLMWithLMHeadModel", masked, _small(emb_dim=48, n_layers=2, n_heads=4, asm=False)),
        ("flaubert", "FlaubertWithLMHeadModel", masked, _small(emb_dim=48, n_layers=2, n_heads=4, layerdrop=0.0)),
        ("xlnet", "XLNetLMHeadModel", tokens, {"vocab_size": _VOCAB, "d_model": 48, "n_layer": 2, "n_head": 4,
            "d_inner": 64, "use_mems_eval": False, **_IDS}),
        ("funnel", "FunnelForMaskedLM", tokens, {"vocab_size": _VOCAB, "block_sizes": [1, 1], "num_decoder_layers": 1,
            "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 64, **_IDS}),
        ("convbert", "ConvBertForMaskedLM", tokens, _small(embedding_size=24, head_ratio=2, conv_kernel_size=3)),
        ("squeezebert", "SqueezeBertForMaskedLM", tokens, _small(embedding_size=48)),
        ("mobilebert", "MobileBertForMaskedLM", tokens, _small(hidden_size=64, embedding_size=32, true_hidden_size=32,
            intra_bottleneck_size=32)),
        ("nystromformer", "NystromformerForMaskedLM", _with(tokens, 16), _small(num_landmarks=4,
            segment_means_seq_len=16, conv_kernel_size=5)),
        ("big_bird", "BigBirdForMaskedLM", _with(tokens, 16), _small(attention_type="original_full")),
        ("longformer", "LongformerForMaskedLM", _with(tokens, 16), _small(attention_window=[4, 4])),
        ("fnet", "FNetForMaskedLM", tokens, _small(type_vocab_size=2)),
        ("ibert", "IBertForMaskedLM", tokens, _small()),
        ("roformer", "RoFormerForMaskedLM", masked, _small(embedding_size=48)),
        ("rembert", "RemBertForMaskedLM", tokens, _small(input_embedding_size=24, output_embedding_size=32)),
        ("modernbert", "ModernBertForMaskedLM", masked, _small(cls_token_id=1, sep_token_id=2, local_attention=6,
            global_attn_every_n_layers=2, **_EAGER)),
        ("nomic_bert", "NomicBertForMaskedLM", tokens, _small()),
        ("eurobert", "EuroBertForMaskedLM", tokens, _small()),
        ("esm", "EsmForMaskedLM", masked, _small(position_embedding_type="rotary", mask_token_id=4)),
        ("ernie", "ErnieForMaskedLM", tokens, _small(**_EAGER)),
        ("megatron-bert", "MegatronBertForMaskedLM", masked, _small()),
        ("mra", "MraForMaskedLM", _with(tokens, 64), _small(block_per_row=2)),
        ("yoso", "YosoForMaskedLM", _with(tokens, 16), _small(use_expectation=True)),
        ("canine", "CanineModel", _with(tokens, 32), _small(num_hash_functions=4, num_hash_buckets=64,
            downsampling_rate=4, local_transformer_stride=8, upsampling_kernel_size=4)),
        ("luke", "LukeForMaskedLM", tokens, _small(entity_vocab_size=20, entity_emb_size=24)),
        ("roc_bert", "RoCBertForMaskedLM", tokens, _small(pronunciation_vocab_size=20, shape_vocab_size=20,
            pronunciation_embed_dim=12, shape_embed_dim=12, enable_pronunciation=False, enable_shape=False)),
        ("splinter", "SplinterModel", tokens, _small()),
        ("layoutlm", "LayoutLMForMaskedLM", boxes, _small(max_2d_position_embeddings=64)),
        ("lilt", "LiltModel", boxes, _small(max_2d_position_embeddings=64, channel_shrink_ratio=2)),
        ("markuplm", "MarkupLMModel", tokens, _small(max_depth=4, xpath_unit_hidden_size=8,
            max_xpath_tag_unit_embeddings=20, max_xpath_subs_unit_embeddings=20, tag_pad_id=10, subs_pad_id=10)),
        ("perceiver", "PerceiverForMaskedLM", masked, _small(d_model=48, d_latents=48, num_latents=6,
            num_self_attends_per_block=2, num_blocks=1, num_self_attention_heads=4, num_cross_attention_heads=4,
            qk_channels=32, v_channels=48)),
    )


def _seq2seqs() -> list[ZooCase]:
    return _table(
        "encoder-decoder",
        ("t5", "T5ForConditionalGeneration", seq2seq, _t5()),
        ("mt5", "MT5ForConditionalGeneration", seq2seq, _t5(feed_forward_proj="gated-gelu")),
        ("umt5", "UMT5ForConditionalGeneration", seq2seq, _t5(feed_forward_proj="gated-gelu")),
        ("longt5", "LongT5ForConditionalGeneration", masked_seq2seq, _t5(local_radius=3, global_block_size=4,
            encoder_attention_type="transient-global")),
        ("switch_transformers", "SwitchTransformersForConditionalGeneration", masked_seq2seq, _t5(num_experts=4,
            expert_capacity=16, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)),
        ("udop", "UdopForConditionalGeneration", lambda: {**boxes(scale=0.01), **masked_seq2seq()},
            _t5(image_size=32, patch_size=16, max_2d_position_embeddings=64)),
        ("bart", "BartForConditionalGeneration", seq2seq, _bart()),
        ("mbart", "MBartForConditionalGeneration", seq2seq, _bart(**_EAGER)),
        ("plbart", "PLBartForConditionalGeneration", seq2seq, _bart()),
        ("mvp", "MvpForConditionalGeneration", seq2seq, _bart()),
        ("pegasus", "PegasusForConditionalGeneration", seq2seq, _bart()),
        ("pegasus_x", "PegasusXForConditionalGeneration", seq2seq, _bart(block_size=4, num_global_tokens=4)),
        ("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", seq2seq, _bart(attention_type="original_full")),
        ("marian", "MarianMTModel", seq2seq, _bart()),
        ("blenderbot", "BlenderbotForConditionalGeneration", seq2seq, _bart(**_EAGER)),
        ("blenderbot-small", "BlenderbotSmallForConditionalGeneration", seq2seq, _bart()),
        ("led", "LEDForConditionalGeneration", seq2seq, _bart(attention_window=[4, 4],
            max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)),
        ("prophetnet", "ProphetNetForConditionalGeneration", seq2seq, {"vocab_size": _VOCAB, "hidden_size": 48,
            "num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 64,
            "ngram": 2, "num_buckets": 8, "relative_max_distance": 16, "decoder_start_token_id": 2, **_IDS,
            "use_cache": False}),
        ("m2m_100", "M2M100ForConditionalGeneration", seq2seq, _bart()),
        ("nllb-moe", "NllbMoeForConditionalGeneration", seq2seq, _bart(num_experts=4, expert_capacity=16,
            encoder_sparse_step=2, decoder_sparse_step=2)),
        ("fsmt", "FSMTForConditionalGeneration", seq2seq, _bart(langs=["en", "de"], src_vocab_size=_VOCAB,
            tgt_vocab_size=_VOCAB)),
        ("t5gemma", "T5GemmaForConditionalGeneration", seq2seq, {"encoder": _decoder(head_dim=12), "decoder":
            _decoder(head_dim=12), "vocab_size": _VOCAB, "use_cache": False}),
    )


def _visions() -> list[ZooCase]:
    return _table(
        "vision",
        ("vit", "ViTForImageClassification", image, _vision()),
        ("deit", "DeiTForImageClassification", image, _vision(**_EAGER)),
        ("beit", "BeitForImageClassification", image, _vision(use_relative_position_bias=True, out_indices=[1, 2],
            vocab_size=20, **_EAGER)),
        ("data2vec-vision", "Data2VecVisionForImageClassification", image,
            _vision(use_shared_relative_position_bias=True, out_indices=[1, 2])),
        ("vit_msn", "ViTMSNForImageClassification", image, _vision()),
        ("vit_mae", "ViTMAEForPreTraining", lambda: {**image(), "noise": _noise(2, 16).sigmoid()},
            _vision(decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
            decoder_intermediate_size=32)),
        ("vitdet", "VitDetModel", image, _vision(pretrain_image_size=32, window_size=2, window_block_indices=[0],
            residual_block_indices=[1], use_relative_position_embeddings=True, drop_path_rate=0.1)),
        ("dinov2", "Dinov2ForImageClassification", image, _vision(drop_path_rate=0.1)),
        ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", image, _vision(**_EAGER)),
        ("dinov3_vit", "DINOv3ViTModel", image, _vision(num_register_tokens=2)),
        ("ijepa", "IJepaForImageClassification", image, _vision()),
        ("swin", "SwinForImageClassification", image, _stages(patch_size=2)),
        ("swinv2", "Swinv2ForImageClassification", image, _stages(patch_size=2, pretrained_window_sizes=[0, 0])),
        ("swin2sr", "Swin2SRForImageSuperResolution", image, _stages(patch_size=1)),
        ("donut-swin", "DonutSwinForImageClassification", image, _stages(patch_size=2)),
        ("maskformer-swin", "MaskFormerSwinModel", image, _stages(patch_size=2)),
        ("focalnet", "FocalNetForImageClassification", image, _stages(patch_size=2, hidden_sizes=[16, 32],
            focal_levels=[2, 2], focal_windows=[3, 3])),
        ("hiera", "HieraForImageClassification", _with(image, 64), {"image_size": [64, 64], "embed_dim": 16, "depths":
            [1, 1, 1], "num_heads": [1, 2, 4], "num_query_pool": 2, "masked_unit_size": [8, 8],
            "masked_unit_attention": [True, True, False], "patch_stride": [2, 2]}),
        ("convnext", "ConvNextForImageClassification", image, {"hidden_sizes": [12, 24, 36], "depths": [1, 1, 1],
            "num_stages": 3, "drop_path_rate": 0.1}),
        ("convnextv2", "ConvNextV2ForImageClassification", image, {"hidden_sizes": [12, 24, 36], "depths": [1, 1, 1],
            "num_stages": 3}),
        ("resnet", "ResNetForImageClassification", image, {"embedding_size": 12, "hidden_sizes": [16, 32, 48],
            "depths": [1, 2, 1]}),
        ("regnet", "RegNetForImageClassification", image, {"embedding_size": 12, "hidden_sizes": [16, 32, 48],
            "depths": [1, 1, 1], "groups_width": 8}),
        ("bit", "BitForImageClassification", image, {"embedding_size": 16, "hidden_sizes": [16, 32, 48], "depths": [1,
            1, 1], "num_groups": 8}),
        ("efficientnet", "EfficientNetForImageClassification", image, {"image_size": 32, "width_coefficient": 0.25,
            "depth_coefficient": 0.25, "hidden_dim": 320}),
        ("mobilenet_v1", "MobileNetV1ForImageClassification", image, {"image_size": 32, "depth_multiplier": 0.25}),
        ("mobilenet_v2", "MobileNetV2ForImageClassification", image, {"image_size": 32, "depth_multiplier": 0.25}),
        ("mobilevit", "MobileViTForImageClassification", _with(image, 64), {"image_size": 64, "hidden_sizes": [16, 24,
            32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]}),
        ("mobilevitv2", "MobileViTV2ForImageClassification", _with(image, 64), {"image_size": 64, "width_multiplier":
            0.25}),
        ("swiftformer", "SwiftFormerForImageClassification", _with(image, 64), {"image_size": 64, "depths": [1, 1, 1,
            1], "embed_dims": [12, 16, 24, 32]}),
        ("segformer", "SegformerForSemanticSegmentation", _with(image, 64), {"hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 24, "num_labels": 5}),
        ("glpn", "GLPNForDepthEstimation", _with(image, 64), {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}),
        ("poolformer", "PoolFormerForImageClassification", _with(image, 64), {"hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1]}),
        ("pvt", "PvtForImageClassification", image, {"image_size": 32, "hidden_sizes": [8, 16, 24, 32], "depths": [1,
            1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "num_labels": 5}),
        ("pvt_v2", "PvtV2ForImageClassification", _with(image, 64), {"image_size": 64, "hidden_sizes": [8, 16, 24,
            32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}),
        ("levit", "LevitForImageClassification", _with(image, 64), {"image_size": 64, "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}),
        ("cvt", "CvtForImageClassification", _with(image, 32), {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2],
            "depth": [1, 2, 3]}),
        ("dpt", "DPTForDepthEstimation", image, _vision(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 12, 16, 24], fusion_hidden_size=16, is_hybrid=False)),
        ("videomae", "VideoMAEForVideoClassification", video, _vision(num_frames=4, tubelet_size=2)),
        ("vivit", "VivitForVideoClassification", video, _vision(num_frames=4, tubelet_size=[2, 8, 8])),
        ("timesformer", "TimesformerForVideoClassification", video, _vision(num_frames=4)),
    )


def _detectors() -> list[ZooCase]:
    return _table(
        "detection",
        ("detr", "DetrForObjectDetection", pixels_and_mask, _detr(**_EAGER)),
        ("conditional_detr", "ConditionalDetrForObjectDetection", pixels_and_mask, _detr()),
        ("table-transformer", "TableTransformerForObjectDetection", pixels_and_mask, _detr()),
        ("dab-detr", "DabDetrForObjectDetection", pixels_and_mask, _detr(hidden_size=48)),
        ("deformable_detr", "DeformableDetrForObjectDetection", pixels_and_mask, _detr(num_feature_levels=2,
            d_model=64)),
        ("yolos", "YolosForObjectDetection", image, _vision(image_size=[32, 32], num_detection_tokens=5,
            use_mid_position_embeddings=False)),
        ("owlvit", "OwlViTModel", text_and_image, _towers(text={"max_position_embeddings": 8})),
    )


def _speech() -> list[ZooCase]:
    return _table(
        "speech",
        ("wav2vec2", "Wav2Vec2ForCTC", wave, _wav2vec2()),
        ("hubert", "HubertForCTC", wave, _wav2vec2(**_EAGER)),
        ("wavlm", "WavLMForCTC", wave, _wav2vec2(num_buckets=8, max_bucket_distance=16)),
        ("unispeech", "UniSpeechForCTC", wave, _wav2vec2(num_ctc_classes=32)),
        ("unispeech-sat", "UniSpeechSatForCTC", wave, _wav2vec2()),
        ("data2vec-audio", "Data2VecAudioForCTC", wave, _wav2vec2(conv_pos_kernel_size=5)),
        ("sew", "SEWForCTC", wave, _wav2vec2(squeeze_factor=2)),
        ("sew-d", "SEWDForCTC", wave, _wav2vec2(squeeze_factor=2, position_buckets=8, max_relative_positions=16,
            pos_att_type=("p2c", "c2p"))),
        ("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", wave, _wav2vec2(conv_depthwise_kernel_size=5,
            position_embeddings_type="relative")),
        ("wav2vec2-bert", "Wav2Vec2BertForCTC", _with(spectrum, "input_features", 20, 12),
            _wav2vec2(feature_projection_input_dim=12, conv_depthwise_kernel_size=5, left_max_position_embeddings=8,
            right_max_position_embeddings=4)),
        ("whisper", "WhisperForConditionalGeneration", _with(spectrum, "input_features", 16, 32, decoder=6),
            _bart(num_mel_bins=16, max_source_positions=16, max_target_positions=16)),
        ("speech_to_text", "Speech2TextForConditionalGeneration", _with(spectrum, "input_features", 32, 16,
            decoder=6), _bart(input_feat_per_channel=16, input_channels=1, conv_channels=24, max_source_positions=32,
            max_target_positions=16)),
        ("moonshine", "MoonshineForConditionalGeneration", lambda: {**wave(4000), "decoder_input_ids": _ids(6)},
            _small(encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
            decoder_num_attention_heads=4, decoder_start_token_id=1)),
        ("speecht5", "SpeechT5ForSpeechToText", lambda: {**wave(), "decoder_input_ids": _ids(6)},
            _bart(**_wav2vec2(vocab_size=_VOCAB), max_speech_positions=64, max_text_positions=64,
            encoder_max_relative_position=16, positional_dropout=0.0)),
        ("audio-spectrogram-transformer", "ASTForAudioClassification", _with(spectrum, "input_values", 32, 16),
            _small(patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16)),
        ("encodec", "EncodecModel", sound, {"hidden_size": 16, "num_filters": 8, "upsampling_ratios": [4, 2],
            "codebook_size": 32, "target_bandwidths": [48.0], "num_lstm_layers": 1, "kernel_size": 5,
            "last_kernel_size": 5}),
        ("dac", "DacModel", sound, {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size":
            32, "upsampling_ratios": [4, 2], "n_codebooks": 2, "codebook_size": 32, "codebook_dim": 8, "hidden_size":
            32, "quantizer_dropout": 0.0}),
        ("univnet", "UnivNetModel", _with(spectrum, "input_features", 100, 8), {"num_mel_bins": 8,
            "model_in_channels": 8, "model_hidden_channels": 8, "kernel_predictor_hidden_channels": 8,
            "resblock_kernel_sizes": [3, 3], "resblock_stride_sizes": [4, 4],
            "resblock_dilation_sizes": [[1, 3], [1, 3]]}),
        ("vits", "VitsModel", tokens, _small(ffn_dim=64, flow_size=16, spectrogram_bins=17,
            upsample_initial_channel=32, upsample_rates=[4, 2], upsample_kernel_sizes=[8, 4],
            duration_predictor_filter_channels=16, wavenet_dilation_rate=1, posterior_encoder_num_wavenet_layers=2,
            prior_encoder_num_wavenet_layers=2, layerdrop=0.0, depth_separable_channels=2, resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]])),
    )


def _multimodal() -> list[ZooCase]:
    return _table(
        "multimodal",
        ("clip", "CLIPModel", text_and_image, _towers()),
        ("chinese_clip", "ChineseCLIPModel", text_and_image, _towers()),
        ("altclip", "AltCLIPModel", text_and_image, _towers(text={"project_dim": 24})),
        ("siglip", "SiglipModel", text_and_image, _towers()),
        ("metaclip_2", "MetaClip2Model", text_and_image, _towers()),
        ("clipseg", "CLIPSegForImageSegmentation", text_and_image, _towers(reduce_dim=16, extract_layers=[0, 1],
            decoder_num_attention_heads=2, decoder_intermediate_size=24, vision={"image_size": 32})),
        ("groupvit", "GroupViTModel", text_and_image, {"text_config": _small(), "projection_dim": 24,
            "projection_intermediate_dim": 32, "vision_config": _vision(depths=[1, 1, 1], num_group_tokens=[0, 4, 0],
            num_output_groups=[0, 4, 2])}),
        ("blip", "BlipForConditionalGeneration", text_and_image, _towers(text={"encoder_hidden_size": 48})),
        ("bridgetower", "BridgeTowerModel", lambda: {**text_and_image(8), **pixels_and_mask(32)}, _small(
            hidden_size=64, text_config=_small(hidden_size=64), vision_config=_vision(hidden_size=64), image_size=32,
            share_cross_modal_transformer_layers=True)),
        ("vilt", "ViltForMaskedLM", lambda: {**masked(8), **pixels_and_mask(32)}, _vision(max_image_length=-1)),
        ("visual_bert", "VisualBertModel", lambda: {**tokens(8), "visual_embeds": _noise(2, 4, 20)},
            _small(visual_embedding_dim=20)),
        ("lxmert", "LxmertForPreTraining", regions, _small(l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=20,
            num_qa_labels=7, num_object_labels=8, num_attr_labels=6)),
        ("flava", "FlavaModel", text_and_image, {"text_config": _small(), "image_config": _vision(),
            "multimodal_config": _small(), "hidden_size": 48, "projection_dim": 24}),
        ("git", "GitForCausalLM", text_and_image, _small(vision_config=_vision())),
        ("clap", "ClapModel", lambda: {**masked(8), "input_features": _noise(2, 1, 32, 16), "is_longer":
            torch.zeros(2, 1, dtype=torch.bool)}, {"text_config": _small(projection_hidden_size=24), "projection_dim":
            24, "audio_config": {"spec_size": 32, "num_mel_bins": 16, "patch_size": 2, "patch_stride": [2, 2],
            "window_size": 2, "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1],
            "num_attention_heads": [2, 4], "enable_fusion": False, "projection_hidden_size": 24}}),
        ("llava", "LlavaForConditionalGeneration", _with(text_with_image_tokens, 16), {"text_config": {"model_type":
            "llama", **_decoder()}, "vision_config": {"model_type": "clip_vision_model", **_vision()},
            "image_token_id": 150, "image_token_index": 150, "vision_feature_layer": -1}),
        ("paligemma", "PaliGemmaForConditionalGeneration", _with(text_with_image_tokens, 16), {"text_config":
            {"model_type": "gemma", **_decoder(head_dim=12)}, "vision_config": {"model_type": "siglip_vision_model",
            **_vision(vision_use_head=False)}, "image_token_id": 150, "image_token_index": 150, "projection_dim": 48,
            "hidden_size": 48}),
        ("layoutlmv3", "LayoutLMv3Model", lambda: {**boxes(), **image()}, _vision(input_size=32,
            max_2d_position_embeddings=64, coordinate_size=8, shape_size=8)),
        ("xclip", "XCLIPModel", lambda: {**masked(8), **video(4)}, _towers(vision={"num_frames": 4, "mit_hidden_size":
            24, "mit_intermediate_size": 64, "mit_num_attention_heads": 4, "mit_num_hidden_layers": 1},
            prompt_layers=1, prompt_num_attention_heads=4)),
    )


def _others() -> list[ZooCase]:
    return _table(
        "other",
        ("decision_transformer", "DecisionTransformerModel", trajectory, _small(state_dim=6, act_dim=3, max_ep_len=16,
            n_layer=2, n_head=4)),
        ("patchtst", "PatchTSTForPrediction", series, _small(num_input_channels=3, context_length=32, patch_length=8,
            patch_stride=8, d_model=24, ffn_dim=32, prediction_length=6)),
        ("patchtsmixer", "PatchTSMixerForPrediction", series, {"num_input_channels": 3, "context_length": 32,
            "patch_length": 8, "patch_stride": 8, "d_model": 16, "num_layers": 2, "prediction_length": 6}),
        ("time_series_transformer", "TimeSeriesTransformerModel", moments, _bart(prediction_length=6,
            context_length=16, num_time_features=2, lags_sequence=[1, 7], d_model=24)),
        ("informer", "InformerModel", moments, _bart(prediction_length=6, context_length=16, num_time_features=2,
            lags_sequence=[1, 7], d_model=24, distil=False)),
    )


# fmt: on


def cases() -> list[ZooCase]:
    made = (_decoders, _mixtures, _recurrent, _encoders, _seq2seqs, _visions, _detectors, _speech, _multimodal, _others)
    return [case for family in made for case in family()]
