// Every op has the plan's tile sizes.

// CHECK: "mk.embed"({{.*}}label = "embed"{{.*}}tile_columns = 32 : i64, num_k_tiles = 1 : i64}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.qkv"{{.*}}tile_columns = 48 : i64, num_k_tiles = 1 : i64}
// CHECK: "mk.attention"({{.*}}label = "layers.0.attention"{{.*}}tile_columns = 1 : i64, num_k_tiles = 1 : i64}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.o"{{.*}}tile_columns = 32 : i64, num_k_tiles = 1 : i64}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.gate_up"{{.*}}tile_columns = 64 : i64, num_k_tiles = 1 : i64}
// CHECK: "mk.fused_linear"({{.*}}label = "layers.0.down"{{.*}}tile_columns = 32 : i64, num_k_tiles = 2 : i64}
// CHECK: "mk.fused_linear"({{.*}}label = "head"{{.*}}tile_columns = 256 : i64, num_k_tiles = 1 : i64}
