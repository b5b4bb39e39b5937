//! The families, one entry each. Facts are those of transformers 5.24; nothing else tells families apart.

use gptq_kernels::{Activation, Pairing, RouterScores};

use super::{Architecture, Defaults, Demand, ExpertNames, Family, Flag, NormNames, QkNormKind, Windows};

const BEFORE: NormNames = NormNames {
    before_attention: Some("input_layernorm"),
    after_attention: None,
    before_mlp: Some("post_attention_layernorm"),
    after_mlp: None,
};

const AFTER: NormNames = NormNames {
    before_attention: None,
    after_attention: Some("post_attention_layernorm"),
    before_mlp: None,
    after_mlp: Some("post_feedforward_layernorm"),
};

const GEMMA_NORMS: NormNames = NormNames {
    before_attention: Some("input_layernorm"),
    before_mlp: Some("pre_feedforward_layernorm"),
    ..AFTER
};

const GLM_NORMS: NormNames = NormNames {
    after_attention: Some("post_self_attn_layernorm"),
    after_mlp: Some("post_mlp_layernorm"),
    ..BEFORE
};

const PLAIN_DEFAULTS: Defaults = Defaults {
    context: 2048,
    bos: Some(1),
    eos: Some(2),
    eps: 1e-6,
    theta: 10000.0,
    tied: false,
    rotary: 1.0,
    head_dim: None,
    score_cap: None,
    logit_cap: None,
};

const LLAMA: Family = Family {
    architecture: Architecture::Llama,
    class_name: "LlamaForCausalLM",
    model_type: "llama",
    norms: BEFORE,
    qk_norm: QkNormKind::None,
    qk_norm_key: None,
    fused_qkv: false,
    fused_gate_up: false,
    pairing: Pairing::Halves,
    gemma: false,
    activation: Activation::Silu,
    qkv_bias: Flag::Key("attention_bias", false),
    o_bias: Flag::Key("attention_bias", false),
    mlp_bias: Flag::Key("mlp_bias", false),
    windows: Windows::Never,
    local_theta: None,
    experts: None,
    keys: &[],
    defaults: PLAIN_DEFAULTS,
};

/// Llama without biases.
const UNBIASED: Family =
    Family { qkv_bias: Flag::Never, o_bias: Flag::Never, mlp_bias: Flag::Never, ..LLAMA };

const MISTRAL: Family = Family {
    architecture: Architecture::Mistral,
    class_name: "MistralForCausalLM",
    model_type: "mistral",
    windows: Windows::Everywhere(Some(4096)),
    defaults: Defaults { context: 131_072, ..PLAIN_DEFAULTS },
    ..UNBIASED
};

const QWEN_DEFAULTS: Defaults = Defaults { context: 32_768, bos: None, eos: None, ..PLAIN_DEFAULTS };

const QWEN2: Family = Family {
    architecture: Architecture::Qwen2,
    class_name: "Qwen2ForCausalLM",
    model_type: "qwen2",
    qkv_bias: Flag::Always,
    windows: Windows::OnDemand(Demand::Later),
    defaults: QWEN_DEFAULTS,
    ..UNBIASED
};

const QWEN3: Family = Family {
    architecture: Architecture::Qwen3,
    class_name: "Qwen3ForCausalLM",
    model_type: "qwen3",
    qk_norm: QkNormKind::Head,
    qkv_bias: Flag::Key("attention_bias", false),
    o_bias: Flag::Key("attention_bias", false),
    windows: Windows::OnDemand(Demand::Later),
    defaults: Defaults { head_dim: Some(128), ..QWEN_DEFAULTS },
    ..UNBIASED
};

const PHI3: Family = Family {
    architecture: Architecture::Phi3,
    class_name: "Phi3ForCausalLM",
    model_type: "phi3",
    fused_qkv: true,
    fused_gate_up: true,
    windows: Windows::Everywhere(None),
    keys: &["partial_rotary_factor"],
    defaults: Defaults { context: 4096, eos: Some(32_000), eps: 1e-5, ..PLAIN_DEFAULTS },
    ..UNBIASED
};

const GEMMA2: Family = Family {
    architecture: Architecture::Gemma2,
    class_name: "Gemma2ForCausalLM",
    model_type: "gemma2",
    norms: GEMMA_NORMS,
    gemma: true,
    activation: Activation::GeluTanh,
    qkv_bias: Flag::Key("attention_bias", false),
    o_bias: Flag::Key("attention_bias", false),
    windows: Windows::AllButEvery(2),
    keys: &["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"],
    defaults: Defaults {
        context: 8192,
        bos: Some(2),
        eos: Some(1),
        tied: true,
        head_dim: Some(256),
        score_cap: Some(50.0),
        logit_cap: Some(30.0),
        ..PLAIN_DEFAULTS
    },
    ..UNBIASED
};

const GEMMA3: Family = Family {
    architecture: Architecture::Gemma3,
    class_name: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    qk_norm: QkNormKind::Head,
    windows: Windows::AllButEvery(6),
    local_theta: Some(10_000.0),
    defaults: Defaults {
        context: 131_072,
        theta: 1_000_000.0,
        score_cap: None,
        logit_cap: None,
        ..GEMMA2.defaults
    },
    ..GEMMA2
};

const OLMO_DEFAULTS: Defaults = Defaults { bos: None, eos: Some(50_279), eps: 1e-5, ..PLAIN_DEFAULTS };

const OLMO2: Family = Family {
    architecture: Architecture::Olmo2,
    class_name: "Olmo2ForCausalLM",
    model_type: "olmo2",
    norms: AFTER,
    qk_norm: QkNormKind::AllHeads,
    qkv_bias: Flag::Key("attention_bias", false),
    o_bias: Flag::Key("attention_bias", false),
    defaults: OLMO_DEFAULTS,
    ..UNBIASED
};

const OLMO3: Family = Family {
    architecture: Architecture::Olmo3,
    class_name: "Olmo3ForCausalLM",
    model_type: "olmo3",
    windows: Windows::AllButEvery(4),
    local_theta: Some(500_000.0),
    defaults: Defaults { theta: 500_000.0, ..OLMO_DEFAULTS },
    ..OLMO2
};

const SMOLLM3: Family = Family {
    architecture: Architecture::SmolLm3,
    class_name: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    windows: Windows::OnDemand(Demand::Unrotated),
    keys: &["no_rope_layers", "no_rope_layer_interval"],
    defaults: Defaults {
        context: 32_768,
        bos: Some(128_000),
        eos: Some(128_001),
        theta: 2_000_000.0,
        tied: true,
        ..PLAIN_DEFAULTS
    },
    ..LLAMA
};

const GLM_DEFAULTS: Defaults =
    Defaults { context: 131_072, bos: None, eos: None, rotary: 0.5, ..PLAIN_DEFAULTS };

const GLM4: Family = Family {
    architecture: Architecture::Glm4,
    class_name: "Glm4ForCausalLM",
    model_type: "glm4",
    norms: GLM_NORMS,
    fused_gate_up: true,
    pairing: Pairing::Neighbours,
    qkv_bias: Flag::Key("attention_bias", true),
    keys: &["partial_rotary_factor"],
    defaults: Defaults { eps: 1.5625e-7, head_dim: Some(128), ..GLM_DEFAULTS },
    ..UNBIASED
};

const GRANITE: Family = Family {
    architecture: Architecture::Granite,
    class_name: "GraniteForCausalLM",
    model_type: "granite",
    keys: &["attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"],
    ..LLAMA
};

const ERNIE45: Family = Family {
    architecture: Architecture::Ernie45,
    class_name: "Ernie4_5ForCausalLM",
    model_type: "ernie4_5",
    pairing: Pairing::Neighbours,
    qkv_bias: Flag::Key("use_bias", false),
    o_bias: Flag::Key("use_bias", false),
    mlp_bias: Flag::Key("use_bias", false),
    defaults: Defaults {
        context: 131_072,
        eps: 1e-5,
        theta: 500_000.0,
        tied: true,
        head_dim: Some(128),
        ..PLAIN_DEFAULTS
    },
    ..LLAMA
};

const SEED_OSS: Family = Family {
    architecture: Architecture::SeedOss,
    class_name: "SeedOssForCausalLM",
    model_type: "seed_oss",
    qkv_bias: Flag::Key("attention_bias", true),
    o_bias: Flag::Key("attention_out_bias", false),
    defaults: Defaults { context: 524_288, bos: Some(0), head_dim: Some(128), ..PLAIN_DEFAULTS },
    ..LLAMA
};

const MINISTRAL3: Family = Family {
    architecture: Architecture::Ministral3,
    class_name: "Ministral3ForCausalLM",
    model_type: "ministral3",
    windows: Windows::Everywhere(None),
    keys: &["llama_4_scaling_beta", "max_position_embeddings"],
    defaults: Defaults { context: 262_144, eps: 1e-5, head_dim: Some(128), ..PLAIN_DEFAULTS },
    ..UNBIASED
};

const QWEN_EXPERTS: ExpertNames = ExpertNames {
    router: "mlp.gate",
    experts: "mlp.experts",
    linears: ["gate_proj", "up_proj", "down_proj"],
    shared: None,
    shared_gate: None,
    correction: None,
    scores: RouterScores::Softmax,
    renormalise: false,
    dense_first: 0,
};

const MIXTRAL: Family = Family {
    architecture: Architecture::Mixtral,
    class_name: "MixtralForCausalLM",
    model_type: "mixtral",
    windows: Windows::Everywhere(None),
    experts: Some(&ExpertNames {
        router: "block_sparse_moe.gate",
        experts: "block_sparse_moe.experts",
        linears: ["w1", "w3", "w2"],
        renormalise: true,
        ..QWEN_EXPERTS
    }),
    defaults: Defaults { context: 131_072, eps: 1e-5, theta: 1_000_000.0, ..PLAIN_DEFAULTS },
    ..UNBIASED
};

const QWEN2_MOE: Family = Family {
    architecture: Architecture::Qwen2Moe,
    class_name: "Qwen2MoeForCausalLM",
    model_type: "qwen2_moe",
    qkv_bias: Flag::Key("qkv_bias", true),
    windows: Windows::OnDemand(Demand::EarlierEven),
    experts: Some(&ExpertNames {
        shared: Some("mlp.shared_expert"),
        shared_gate: Some("mlp.shared_expert_gate"),
        ..QWEN_EXPERTS
    }),
    ..QWEN2
};

const QWEN3_MOE: Family = Family {
    architecture: Architecture::Qwen3Moe,
    class_name: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    windows: Windows::OnDemand(Demand::All),
    experts: Some(&QWEN_EXPERTS),
    defaults: QWEN_DEFAULTS,
    ..QWEN3
};

const OLMOE: Family = Family {
    architecture: Architecture::Olmoe,
    class_name: "OlmoeForCausalLM",
    model_type: "olmoe",
    norms: BEFORE,
    experts: Some(&QWEN_EXPERTS),
    defaults: Defaults { context: 4096, ..OLMO_DEFAULTS },
    ..OLMO2
};

const GLM4_MOE: Family = Family {
    architecture: Architecture::Glm4Moe,
    class_name: "Glm4MoeForCausalLM",
    model_type: "glm4_moe",
    qk_norm: QkNormKind::Head,
    qk_norm_key: Some("use_qk_norm"),
    qkv_bias: Flag::Key("attention_bias", false),
    experts: Some(&ExpertNames {
        shared: Some("mlp.shared_experts"),
        correction: Some("mlp.gate.e_score_correction_bias"),
        scores: RouterScores::Sigmoid,
        renormalise: true,
        dense_first: 1,
        ..QWEN_EXPERTS
    }),
    keys: &["use_qk_norm", "partial_rotary_factor"],
    defaults: Defaults { eps: 1e-5, ..GLM_DEFAULTS },
    ..UNBIASED
};

/// All of them, in the order of [`Architecture`].
pub(in crate::config) const FAMILIES: [Family; 20] = [
    LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, OLMO2, OLMO3, SMOLLM3, GLM4, GRANITE, ERNIE45,
    SEED_OSS, MINISTRAL3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GLM4_MOE,
];
