"""Roles: what a weight does in its block, read from the last components of its module path.

Where these do not tell, the graph may (:mod:`lorafx.graph.derived_roles`).
"""

from __future__ import annotations

#: Every role a weight can have. ``attn.qkv`` is a fused projection of at least two of query, key and value,
#: ``ffn.gate_up`` a fused gate and up projection, ``head`` an output layer, ``router`` a gate over experts.
ROLES = (
    "attn.query",
    "attn.key",
    "attn.value",
    "attn.qkv",
    "attn.out",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
    "ffn.gate_up",
    "embedding",
    "head",
    "router",
    "other",
)

# Suffixes of module paths. A bare last component stands here only when every family uses it for one thing;
# names that mean different things ("dense", "out_proj", "Wo") carry their parent.
_SUFFIXES = {
    "attn.query": (
        "query query_proj pos_query_proj q_proj q_lin"  # BERT, DeBERTa-v2, Llama and most since, DistilBERT
        " SelfAttention.q EncDecAttention.q attn.q"  # T5, MPNet
        " q_attn q_a_proj q_b_proj"  # GPT-2 cross-attention, DeepSeek
    ),
    "attn.key": "key key_proj pos_key_proj k_proj k_lin SelfAttention.k EncDecAttention.k attn.k",
    "attn.value": "value value_proj v_proj v_lin SelfAttention.v EncDecAttention.v attn.v",
    "attn.qkv": (
        "c_attn Wqkv qkv qkv_proj query_key_value self.in_proj"  # GPT-2, ModernBERT, Phi-3, NeoX, DeBERTa
        " kv_a_proj_with_mqa kv_b_proj"  # DeepSeek
    ),
    "attn.out": (
        "attention.output.dense"  # BERT
        " attention.dense self_attention.dense self_attn.dense"  # ALBERT, BLOOM, Phi
        " o_proj out_lin attn.c_proj crossattention.c_proj attn.Wo"  # Llama, DistilBERT, GPT-2, ModernBERT
        " attn.out_proj self_attn.out_proj encoder_attn.out_proj attention.out_proj"  # GPT-J, CLIP, Whisper
        " SelfAttention.o EncDecAttention.o attn.o attn.proj"  # T5, MPNet, timm
    ),
    "ffn.up": (
        "intermediate.dense ffn.lin1 ffn mlp.c_fc fc1 fc_in"  # BERT, DistilBERT, ALBERT, GPT-2, CLIP, GPT-J
        " up_proj DenseReluDense.wi DenseReluDense.wi_1 dense_h_to_4h"  # Llama, T5, NeoX
    ),
    "ffn.gate": "gate_proj DenseReluDense.wi_0",  # the side that goes through the activation
    "ffn.down": (
        "output.dense ffn.lin2 ffn_output mlp.c_proj fc2 fc_out"  # as ffn.up, line by line
        " down_proj DenseReluDense.wo dense_4h_to_h mlp.Wo"
    ),
    "ffn.gate_up": "gate_up_proj mlp.Wi",  # Phi-3, ModernBERT
    "embedding": (
        "word_embeddings position_embeddings token_type_embeddings embed_tokens embed_positions wte wpe"
        " patch_embedding patch_embeddings.projection"
    ),
    "head": (
        "classifier classifier.dense classifier.out_proj score qa_outputs cls.seq_relationship"
        " classification_head.dense classification_head.out_proj"  # BART
        # `decoder` alone: a weight of that name is always the tied output of a masked language model.
        " lm_head decoder generator_lm_head vocab_projector proj_out embed_out"
    ),
    "router": "mlp.gate block_sparse_moe.gate router router.classifier shared_expert_gate",
}

_ROLE_OF_SUFFIX = {suffix: role for role, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_LONGEST = max(suffix.count(".") + 1 for suffix in _ROLE_OF_SUFFIX)


def role_of(module_path: str, kind: str) -> str:
    """The role of the weight owned by ``module_path``, one of :data:`ROLES`; ``"other"`` when unknown.

    ``kind`` is how the weight is used: a look-up (``"embedding"``) is an embedding whatever its name. Else
    the longest known suffix decides, so that ``attention.output.dense`` is not taken for ``output.dense``.
    """
    if kind == "embedding":
        return "embedding"
    parts = module_path.split(".")
    for length in range(min(_LONGEST, len(parts)), 0, -1):
        role = _ROLE_OF_SUFFIX.get(".".join(parts[-length:]))
        if role is not None:
            return role
    return "other"
