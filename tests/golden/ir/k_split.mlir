// down is split in K: partial sums, then a reduce that adds the residual.

// CHECK: [[PARTS:%[0-9]+]] = "mk.partial_linear"([[MLP:%[0-9]+]], [[WEIGHT:%[0-9]+]]) {label = "layers.0.down", prologue = "none", tile_columns = 32 : i64, num_k_tiles = 2 : i64, operandSegmentSizes = array<i32: 1, 0, 1>} : (!mk.rows<96, F32>, !mk.weights<64, 96, Q4_1>) -> !mk.parts<2, 64, F32>
// CHECK: [[DOWN:%[0-9]+]] = "mk.reduce"([[PARTS]], [[HIDDEN:%[0-9]+]]) {label = "layers.0.down", epilogue = "residual", tile_columns = 32 : i64, num_k_tiles = 2 : i64, operandSegmentSizes = array<i32: 1, 0, 0, 1, 0>, resultSegmentSizes = array<i32: 1, 0, 0>} : (!mk.parts<2, 64, F32>, !mk.rows<64, F32>) -> !mk.rows<64, F32>
