// Triples (tile, counter, arrivals): a worker waits only for what its own order does not cover.

// CHECK: "mk.embed"({{.*}}label = "embed"{{.*}}counter = 0 : i64, signals = array<i32: 0, 1>}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.qkv"{{.*}}counter = 1 : i64, signals = array<i32: 0, 1, 2>, waits = array<i32: 0, 0, 2, 1, 0, 2, 2, 0, 2>}
// CHECK: "mk.attention"({{.*}}label = "layers.0.attention"{{.*}}counter = 2 : i64, signals = array<i32: 0, 2, 3>, waits = array<i32: 0, 1, 3, 1, 1, 3, 3, 1, 3>}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.o"{{.*}}counter = 3 : i64, signals = array<i32: 0, 1>, waits = array<i32: 0, 2, 3, 1, 2, 3>}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.gate_up"{{.*}}counter = 4 : i64, signals = array<i32: 0, 1, 2>, waits = array<i32: 0, 3, 2, 1, 3, 2, 2, 3, 2>}
// CHECK: "mk.partial_linear"({{.*}}label = "layers.0.down"{{.*}}counter = 5 : i64, signals = array<i32: 1, 2, 3>, waits = array<i32: 1, 4, 3, 2, 4, 3, 3, 4, 3>}
// CHECK: "mk.reduce"({{.*}}label = "layers.0.down"{{.*}}counter = 6 : i64, signals = array<i32: 0, 1>, waits = array<i32: 1, 5, 3>}
// CHECK: "mk.fused_linear"({{.*}}label = "head"{{.*}}waits = array<i32: 0, 6, 2, 1, 6, 2, 2, 6, 2>}
