// Every tile has a worker; attention deals the splits of KV head h from worker h on.

// CHECK: "mk.embed"({{.*}}label = "embed"{{.*}}workers = array<i32: 0, 1>}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.qkv"{{.*}}workers = array<i32: 0, 1, 2>}
// CHECK: "mk.attention"({{.*}}label = "layers.0.attention"{{.*}}workers = array<i32: 0, 1, 1, 2>}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.o"{{.*}}workers = array<i32: 0, 1>}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.gate_up"{{.*}}workers = array<i32: 0, 1, 2>}
// CHECK: "mk.partial_linear"({{.*}}label = "layers.0.down"{{.*}}workers = array<i32: 0, 0, 1, 2>}
// CHECK: "mk.reduce"({{.*}}label = "layers.0.down"{{.*}}workers = array<i32: 0, 1>}
// CHECK: "mk.fused_linear"({{.*}}label = "head"{{.*}}workers = array<i32: 0, 1, 2>}
