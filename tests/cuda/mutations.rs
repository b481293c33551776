//! Kernels broken on purpose, one at a time: the tests of `tests/cuda_ops` notice each. `docs/gpu.md` shows the list.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common::cuda_emulator::{MUTATION, folder, program};
use rayon::prelude::*;
use std::{fs, path::Path, process::Command};

/// One way to be wrong.
struct Mutation {
    what: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
    /// The test of `tests/cuda_ops` that must fail.
    test: &'static str,
    /// What its failure says.
    says: &'static str,
}

const MUTATIONS: [Mutation; 28] = [
    Mutation {
        what: "a wrong stride",
        file: "rope.cu",
        from: "u32 t = head / heads % len;",
        to: "u32 t = head % len;",
        test: "rope_turns_and_turns_back",
        says: "instead of",
    },
    Mutation {
        what: "threads of the grid that go through the same elements",
        file: "elementwise.cu",
        from: "i += (u64)gridDim.x * blockDim.x",
        to: "i += blockDim.x",
        test: "loops_over_whole_buffers",
        says: "instead of",
    },
    Mutation {
        what: "no barrier before a sum is read",
        file: "cross_entropy.cu",
        from: "parts[threadIdx.x / 32] = x;\n    __syncthreads();\n    double total = 0.0;",
        to: "parts[threadIdx.x / 32] = x;\n    double total = 0.0;",
        test: "cross_entropy_of_some_rows",
        says: "instead of",
    },
    Mutation {
        what: "no barrier before keys give way to values",
        file: "attention.cu",
        from: "top = new_top;\n        __syncthreads();",
        to: "top = new_top;",
        test: "attention_of_narrow_heads",
        says: "instead of",
    },
    Mutation {
        what: "no barrier before the next queries come",
        file: "attention.cu",
        from: "acc_k[j] += y * q_tile[i * (e.dim + 1) + d];\n                    }\n                }\n            }\n            __syncthreads();",
        to: "acc_k[j] += y * q_tile[i * (e.dim + 1) + d];\n                    }\n                }\n            }",
        test: "attention_of_narrow_heads",
        says: "instead of",
    },
    Mutation {
        what: "a barrier that some threads do not reach",
        file: "cross_entropy.cu",
        from: "top = block_max(top);",
        to: "if (threadIdx.x >= 32 && threadIdx.x >= vocab) return; top = block_max(top);",
        test: "cross_entropy_of_some_rows",
        says: "reach",
    },
    Mutation {
        what: "a query that does not see its own key",
        file: "attention.cu",
        from: "key + c <= row;",
        to: "key + c < row;",
        test: "attention_of_narrow_heads",
        says: "instead of",
    },
    Mutation {
        what: "a query that sees the key after it, backward",
        file: "attention.cu",
        from: "key + lane + j * LANES <= row;",
        to: "key + lane + j * LANES <= row + 1;",
        test: "attention_of_middling_heads",
        says: "instead of",
    },
    Mutation {
        what: "swapped operands",
        file: "attention.cu",
        from: "products<TILE>(d_o_tile, v_tile, r, lane, e.dim, ds);",
        to: "products<TILE>(v_tile, d_o_tile, r, lane, e.dim, ds);",
        test: "attention_of_wide_heads",
        says: "instead of",
    },
    Mutation {
        what: "rows of a tile that overlap",
        file: "attention.cu",
        from: "tile[r * (dim + 1) + d] = ",
        to: "tile[r * dim + d] = ",
        test: "attention_of_wide_heads",
        says: "instead of",
    },
    Mutation {
        what: "a key head that belongs to other queries",
        file: "attention.cu",
        from: "for (u32 h = kv * group; h < (kv + 1) * group; h++)",
        to: "for (u32 h = kv; h < e.heads; h += e.kv_heads)",
        test: "attention_of_narrow_heads",
        says: "instead of",
    },
    Mutation {
        what: "reading beyond the end",
        file: "rms_norm.cu",
        from: "min(first + ROWS, rows)",
        to: "first + ROWS",
        test: "rms_norm_forward_and_backward",
        says: "beyond an allocation",
    },
    Mutation {
        what: "writing beyond the end",
        file: "adamw.cu",
        from: "FOR_EACH(i, n) {",
        to: "FOR_EACH(i, n + 1) {",
        test: "adamw_updates",
        says: "beyond an allocation",
    },
    Mutation {
        what: "a loop that ends one too late",
        file: "embedding.cu",
        from: "i < end; i++",
        to: "i <= end; i++",
        test: "embedding_gathers_and_adds_in_the_order_of_the_rows",
        says: "",
    },
    Mutation {
        what: "the wrong column of the gradient",
        file: "cross_entropy.cu",
        from: "i == target ?",
        to: "i == target + 1 ?",
        test: "cross_entropy_of_some_rows",
        says: "instead of",
    },
    Mutation {
        what: "ties that do not go to the even number",
        file: "round.cu",
        from: "(bits + 0x7fffu + ((bits >> 16) & 1u))",
        to: "(bits + 0x7fffu)",
        test: "rounding_to_bf16_has_the_cpus_bits",
        says: "instead of",
    },
    Mutation {
        what: "another random stream",
        file: "dropout.cu",
        from: "k1 += 0xbb67ae85u;",
        to: "k1 += 0xbb67ae84u;",
        test: "dropout_drops_what_the_cpu_drops",
        says: "instead of",
    },
    Mutation {
        what: "bf16 that is cut off instead of rounded",
        file: "elementwise.cu",
        from: "bits + 0x7fffu + ((bits >> 16) & 1u);",
        to: "bits;",
        test: "copies_become_bf16_and_f32_again",
        says: "instead of",
    },
    Mutation {
        what: "the norm of what was there before the sum",
        file: "rms_norm.cu",
        from: "x = sum; //",
        to: "//",
        test: "rms_norm_forward_and_backward",
        says: "instead of",
    },
    Mutation {
        what: "a digit that is one too large",
        file: "prune.cu",
        from: "skip >= select->count[digit])",
        to: "skip + 1 >= select->count[digit])",
        test: "pruning_keeps_what_the_cpu_keeps",
        says: "instead of",
    },
    Mutation {
        what: "counts that are not cleared",
        file: "prune.cu",
        from: "    count[threadIdx.x] = 0;\n    __syncthreads();\n    // What",
        to: "    // What",
        test: "pruning_keeps_what_the_cpu_keeps",
        says: "instead of",
    },
    Mutation {
        what: "no barrier before counts are added up",
        file: "prune.cu",
        from: "1u);\n    }\n    __syncthreads();",
        to: "1u);\n    }",
        test: "pruning_keeps_what_the_cpu_keeps",
        says: "instead of",
    },
    Mutation {
        what: "heads that follow each other without gaps",
        file: "softmax.cu",
        from: "lse[(first + row / e.len * step) * e.len + query] = ",
        to: "lse[(first + row / e.len) * e.len + query] = ",
        test: "attention_of_narrow_heads",
        says: "instead of",
    },
    Mutation {
        what: "matrices of the second window that are those of the first",
        file: "elementwise.cu",
        from: "to[i] = a + row * a_row",
        to: "to[i] = a",
        test: "attention_of_narrow_heads",
        says: "instead of",
    },
    Mutation {
        what: "a key after the query that is not 0",
        file: "softmax.cu",
        from: "float x = key <= query ?",
        to: "float x = key <= query + 1 ?",
        test: "attention_of_narrow_heads",
        says: "instead of",
    },
    Mutation {
        what: "a gradient of scores without delta",
        file: "softmax.cu",
        from: "x * (dp[i] - row_delta)",
        to: "x * dp[i]",
        test: "attention_of_wide_heads",
        says: "instead of",
    },
    Mutation {
        what: "a wrong derivative",
        file: "swiglu.cu",
        from: "(1.0f - s)",
        to: "(1.0f + s)",
        test: "swiglu_forward_and_backward",
        says: "instead of",
    },
    Mutation {
        what: "declared for smaller blocks than are launched",
        file: "rope.cu",
        from: "void __launch_bounds__(THREADS)",
        to: "void __launch_bounds__(128)",
        test: "rope_turns_and_turns_back",
        says: "is declared for blocks of up to 128 threads, not of 256",
    },
];

fn run(test: &str, mutation: Option<&Mutation>) -> (bool, String) {
    let mut command = Command::new(program("cuda_ops"));
    command.args([test, "--exact", "--test-threads=1"]);
    if let Some(m) = mutation {
        command.envs(MUTATION.into_iter().zip([m.file, m.from, m.to]));
    }
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn every_broken_kernel_is_noticed() {
    folder();
    let missed: Vec<String> = MUTATIONS
        .par_iter()
        .filter_map(|m| {
            let (passed, text) = run(m.test, Some(m));
            // It must fail for what it computes, not because it cannot be compiled.
            let noticed =
                !passed && text.contains("1 failed") && text.contains(m.says) && !text.contains("not compile");
            (!noticed).then(|| format!("{} ({}) is not noticed by {}:\n{text}", m.what, m.file, m.test))
        })
        .collect();
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn the_kernels_as_they_are_pass_and_the_guide_lists_what_is_broken() {
    let guide = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/gpu.md")).unwrap();
    for m in &MUTATIONS {
        let row = format!("| `{}` | {} | `{}` |", m.file, m.what, m.test);
        assert!(guide.contains(&row), "docs/gpu.md lacks: {row}");
    }
    let (passed, text) = run("rope_turns_and_turns_back", None);
    assert!(passed && text.contains("1 passed"), "{text}");
}
