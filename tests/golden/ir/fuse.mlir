// One op a wave is left: embed; qkv, attention, o, gate_up, down; head.

// CHECK: [[TOKENS:%[0-9]+]] = "mk.tokens"() : () -> !mk.tokens<I32>
// CHECK-NEXT: [[EMBED:%[0-9]+]] = "mk.weight"() {label = "embed"} : () -> !mk.weights<700, 64, Q8_0>
// CHECK-NEXT: [[EMBED_2:%[0-9]+]] = "mk.embed"([[TOKENS]], [[EMBED]]) {label = "embed"} : (!mk.tokens<I32>, !mk.weights<700, 64, Q8_0>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[ATTN_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.attn_norm"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[Q_BIAS:%[0-9]+]] = "mk.vector"() {label = "layers.0.q_bias"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[Q:%[0-9]+]] = "mk.weight"() {label = "layers.0.q"} : () -> !mk.weights<64, 64, Q4_1>
// CHECK-NEXT: [[Q_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.q_norm"} : () -> !mk.vector<16, F32>
// CHECK-NEXT: [[K_BIAS:%[0-9]+]] = "mk.vector"() {label = "layers.0.k_bias"} : () -> !mk.vector<32, F32>
// CHECK-NEXT: [[K:%[0-9]+]] = "mk.weight"() {label = "layers.0.k"} : () -> !mk.weights<32, 64, Q4_1>
// CHECK-NEXT: [[K_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.k_norm"} : () -> !mk.vector<16, F32>
// CHECK-NEXT: [[V_BIAS:%[0-9]+]] = "mk.vector"() {label = "layers.0.v_bias"} : () -> !mk.vector<32, F32>
// CHECK-NEXT: [[V:%[0-9]+]] = "mk.weight"() {label = "layers.0.v"} : () -> !mk.weights<32, 64, Q4_1>
// CHECK-NEXT: [[KV:%[0-9]+]] = "mk.kv"() {layer = 0 : i64} : () -> !mk.kv<2, 16, F16>
// CHECK-NEXT: [[QKV:%[0-9]+]], [[QKV_KV:%[0-9]+]] = "mk.fused_linear"([[EMBED_2]], [[ATTN_NORM]], [[Q]], [[K]], [[V]], [[Q_BIAS]], [[K_BIAS]], [[V_BIAS]], [[Q_NORM]], [[K_NORM]], [[KV]]) {label = "layers.0.qkv", prologue = "rms_norm", epilogue = "rope_append", operandSegmentSizes = array<i32: 1, 1, 3, 3, 2, 0, 1>, resultSegmentSizes = array<i32: 1, 1, 0>} : (!mk.rows<64, F32>, !mk.vector<64, F32>, !mk.weights<64, 64, Q4_1>, !mk.weights<32, 64, Q4_1>, !mk.weights<32, 64, Q4_1>, !mk.vector<64, F32>, !mk.vector<32, F32>, !mk.vector<32, F32>, !mk.vector<16, F32>, !mk.vector<16, F32>, !mk.kv<2, 16, F16>) -> (!mk.rows<64, F32>, !mk.kv<2, 16, F16>)
// CHECK-NEXT: [[ATTENTION:%[0-9]+]] = "mk.attention"([[QKV]], [[QKV_KV]]) {label = "layers.0.attention", split_tokens = 128 : i64} : (!mk.rows<64, F32>, !mk.kv<2, 16, F16>) -> !mk.splits<4, 16, F32>
// CHECK-NEXT: [[O:%[0-9]+]] = "mk.weight"() {label = "layers.0.o"} : () -> !mk.weights<64, 64, Q4_1>
// CHECK-NEXT: [[O_2:%[0-9]+]] = "mk.fused_linear"([[ATTENTION]], [[O]], [[EMBED_2]]) {label = "layers.0.o", prologue = "combine", epilogue = "residual", operandSegmentSizes = array<i32: 1, 0, 1, 0, 0, 1, 0>, resultSegmentSizes = array<i32: 1, 0, 0>} : (!mk.splits<4, 16, F32>, !mk.weights<64, 64, Q4_1>, !mk.rows<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[MLP_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.mlp_norm"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[GATE:%[0-9]+]] = "mk.weight"() {label = "layers.0.gate"} : () -> !mk.weights<96, 64, Q4_1>
// CHECK-NEXT: [[UP:%[0-9]+]] = "mk.weight"() {label = "layers.0.up"} : () -> !mk.weights<96, 64, Q4_1>
// CHECK-NEXT: [[GATE_UP:%[0-9]+]] = "mk.fused_linear"([[O_2]], [[MLP_NORM]], [[GATE]], [[UP]]) {label = "layers.0.gate_up", prologue = "rms_norm", epilogue = "swiglu", operandSegmentSizes = array<i32: 1, 1, 2, 0, 0, 0, 0>, resultSegmentSizes = array<i32: 1, 0, 0>} : (!mk.rows<64, F32>, !mk.vector<64, F32>, !mk.weights<96, 64, Q4_1>, !mk.weights<96, 64, Q4_1>) -> !mk.rows<96, F32>
// CHECK-NEXT: [[DOWN:%[0-9]+]] = "mk.weight"() {label = "layers.0.down"} : () -> !mk.weights<64, 96, Q4_1>
// CHECK-NEXT: [[DOWN_2:%[0-9]+]] = "mk.fused_linear"([[GATE_UP]], [[DOWN]], [[O_2]]) {label = "layers.0.down", prologue = "none", epilogue = "residual", operandSegmentSizes = array<i32: 1, 0, 1, 0, 0, 1, 0>, resultSegmentSizes = array<i32: 1, 0, 0>} : (!mk.rows<96, F32>, !mk.weights<64, 96, Q4_1>, !mk.rows<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[FINAL_NORM:%[0-9]+]] = "mk.vector"() {label = "final_norm"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[HEAD:%[0-9]+]], [[HEAD_STATS:%[0-9]+]] = "mk.fused_linear"([[DOWN_2]], [[FINAL_NORM]], [[EMBED]]) {label = "head", prologue = "rms_norm", epilogue = "logits", operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0>, resultSegmentSizes = array<i32: 1, 0, 1>} : (!mk.rows<64, F32>, !mk.vector<64, F32>, !mk.weights<700, 64, Q8_0>) -> (!mk.rows<700, F32>, !mk.stats<3, F32>)
// CHECK-NEXT: "mk.output"([[HEAD]], [[HEAD_STATS]]) : (!mk.rows<700, F32>, !mk.stats<3, F32>) -> ()
// CHECK-NOT: mk.rms_norm
