// The decode step of one Qwen3 layer with biases, as a graph.

// CHECK: [[TOKENS:%[0-9]+]] = "mk.tokens"() : () -> !mk.tokens<I32>
// CHECK-NEXT: [[EMBED:%[0-9]+]] = "mk.weight"() {label = "embed"} : () -> !mk.weights<700, 64, Q8_0>
// CHECK-NEXT: [[EMBED_2:%[0-9]+]] = "mk.embed"([[TOKENS]], [[EMBED]]) {label = "embed"} : (!mk.tokens<I32>, !mk.weights<700, 64, Q8_0>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[ATTN_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.attn_norm"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[RMS_NORM:%[0-9]+]] = "mk.rms_norm"([[EMBED_2]], [[ATTN_NORM]]) {epsilon = 1.000000e-05 : f64} : (!mk.rows<64, F32>, !mk.vector<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[Q_BIAS:%[0-9]+]] = "mk.vector"() {label = "layers.0.q_bias"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[Q:%[0-9]+]] = "mk.weight"() {label = "layers.0.q"} : () -> !mk.weights<64, 64, Q4_1>
// CHECK-NEXT: [[LINEAR:%[0-9]+]] = "mk.linear"([[RMS_NORM]], [[Q]], [[Q_BIAS]]) : (!mk.rows<64, F32>, !mk.weights<64, 64, Q4_1>, !mk.vector<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[Q_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.q_norm"} : () -> !mk.vector<16, F32>
// CHECK-NEXT: [[HEAD_NORM:%[0-9]+]] = "mk.head_norm"([[LINEAR]], [[Q_NORM]]) {epsilon = 1.000000e-05 : f64} : (!mk.rows<64, F32>, !mk.vector<16, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[ROPE:%[0-9]+]] = "mk.rope"([[HEAD_NORM]]) {head_dim = 16 : i64, scale = 2.500000e-01 : f64} : (!mk.rows<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[K_BIAS:%[0-9]+]] = "mk.vector"() {label = "layers.0.k_bias"} : () -> !mk.vector<32, F32>
// CHECK-NEXT: [[K:%[0-9]+]] = "mk.weight"() {label = "layers.0.k"} : () -> !mk.weights<32, 64, Q4_1>
// CHECK-NEXT: [[LINEAR_2:%[0-9]+]] = "mk.linear"([[RMS_NORM]], [[K]], [[K_BIAS]]) : (!mk.rows<64, F32>, !mk.weights<32, 64, Q4_1>, !mk.vector<32, F32>) -> !mk.rows<32, F32>
// CHECK-NEXT: [[K_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.k_norm"} : () -> !mk.vector<16, F32>
// CHECK-NEXT: [[HEAD_NORM_2:%[0-9]+]] = "mk.head_norm"([[LINEAR_2]], [[K_NORM]]) {epsilon = 1.000000e-05 : f64} : (!mk.rows<32, F32>, !mk.vector<16, F32>) -> !mk.rows<32, F32>
// CHECK-NEXT: [[ROPE_2:%[0-9]+]] = "mk.rope"([[HEAD_NORM_2]]) {head_dim = 16 : i64, scale = 1.000000e+00 : f64} : (!mk.rows<32, F32>) -> !mk.rows<32, F32>
// CHECK-NEXT: [[V_BIAS:%[0-9]+]] = "mk.vector"() {label = "layers.0.v_bias"} : () -> !mk.vector<32, F32>
// CHECK-NEXT: [[V:%[0-9]+]] = "mk.weight"() {label = "layers.0.v"} : () -> !mk.weights<32, 64, Q4_1>
// CHECK-NEXT: [[LINEAR_3:%[0-9]+]] = "mk.linear"([[RMS_NORM]], [[V]], [[V_BIAS]]) : (!mk.rows<64, F32>, !mk.weights<32, 64, Q4_1>, !mk.vector<32, F32>) -> !mk.rows<32, F32>
// CHECK-NEXT: [[KV:%[0-9]+]] = "mk.kv"() {layer = 0 : i64} : () -> !mk.kv<2, 16, F16>
// CHECK-NEXT: [[KV_APPEND:%[0-9]+]] = "mk.kv_append"([[ROPE_2]], [[LINEAR_3]], [[KV]]) : (!mk.rows<32, F32>, !mk.rows<32, F32>, !mk.kv<2, 16, F16>) -> !mk.kv<2, 16, F16>
// CHECK-NEXT: [[ATTENTION:%[0-9]+]] = "mk.attention"([[ROPE]], [[KV_APPEND]]) {label = "layers.0.attention", split_tokens = 128 : i64} : (!mk.rows<64, F32>, !mk.kv<2, 16, F16>) -> !mk.splits<4, 16, F32>
// CHECK-NEXT: [[COMBINE:%[0-9]+]] = "mk.combine"([[ATTENTION]]) : (!mk.splits<4, 16, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[O:%[0-9]+]] = "mk.weight"() {label = "layers.0.o"} : () -> !mk.weights<64, 64, Q4_1>
// CHECK-NEXT: [[LINEAR_4:%[0-9]+]] = "mk.linear"([[COMBINE]], [[O]]) : (!mk.rows<64, F32>, !mk.weights<64, 64, Q4_1>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[ADD:%[0-9]+]] = "mk.add"([[EMBED_2]], [[LINEAR_4]]) : (!mk.rows<64, F32>, !mk.rows<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[MLP_NORM:%[0-9]+]] = "mk.vector"() {label = "layers.0.mlp_norm"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[RMS_NORM_2:%[0-9]+]] = "mk.rms_norm"([[ADD]], [[MLP_NORM]]) {epsilon = 1.000000e-05 : f64} : (!mk.rows<64, F32>, !mk.vector<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[GATE:%[0-9]+]] = "mk.weight"() {label = "layers.0.gate"} : () -> !mk.weights<96, 64, Q4_1>
// CHECK-NEXT: [[LINEAR_5:%[0-9]+]] = "mk.linear"([[RMS_NORM_2]], [[GATE]]) : (!mk.rows<64, F32>, !mk.weights<96, 64, Q4_1>) -> !mk.rows<96, F32>
// CHECK-NEXT: [[UP:%[0-9]+]] = "mk.weight"() {label = "layers.0.up"} : () -> !mk.weights<96, 64, Q4_1>
// CHECK-NEXT: [[LINEAR_6:%[0-9]+]] = "mk.linear"([[RMS_NORM_2]], [[UP]]) : (!mk.rows<64, F32>, !mk.weights<96, 64, Q4_1>) -> !mk.rows<96, F32>
// CHECK-NEXT: [[SWIGLU:%[0-9]+]] = "mk.swiglu"([[LINEAR_5]], [[LINEAR_6]]) : (!mk.rows<96, F32>, !mk.rows<96, F32>) -> !mk.rows<96, F32>
// CHECK-NEXT: [[DOWN:%[0-9]+]] = "mk.weight"() {label = "layers.0.down"} : () -> !mk.weights<64, 96, Q4_1>
// CHECK-NEXT: [[LINEAR_7:%[0-9]+]] = "mk.linear"([[SWIGLU]], [[DOWN]]) : (!mk.rows<96, F32>, !mk.weights<64, 96, Q4_1>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[ADD_2:%[0-9]+]] = "mk.add"([[ADD]], [[LINEAR_7]]) : (!mk.rows<64, F32>, !mk.rows<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[FINAL_NORM:%[0-9]+]] = "mk.vector"() {label = "final_norm"} : () -> !mk.vector<64, F32>
// CHECK-NEXT: [[RMS_NORM_3:%[0-9]+]] = "mk.rms_norm"([[ADD_2]], [[FINAL_NORM]]) {epsilon = 1.000000e-05 : f64} : (!mk.rows<64, F32>, !mk.vector<64, F32>) -> !mk.rows<64, F32>
// CHECK-NEXT: [[LINEAR_8:%[0-9]+]] = "mk.linear"([[RMS_NORM_3]], [[EMBED]]) : (!mk.rows<64, F32>, !mk.weights<700, 64, Q8_0>) -> !mk.rows<700, F32>
// CHECK-NEXT: [[HEAD_STATS:%[0-9]+]] = "mk.head_stats"([[LINEAR_8]]) {span = 256 : i64} : (!mk.rows<700, F32>) -> !mk.stats<3, F32>
// CHECK-NEXT: "mk.output"([[LINEAR_8]], [[HEAD_STATS]]) : (!mk.rows<700, F32>, !mk.stats<3, F32>) -> ()
