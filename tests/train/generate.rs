//! `generate`: the program on a trained tiny model.

use crate::common::{refused, run, small_run::SmallRun};

#[test]
fn the_same_seed_gives_the_same_text_and_greedy_needs_none() {
    let small = SmallRun::new(1);
    let model = small.train().join("checkpoints/step-20").display().to_string();
    let generate = |more: &[&str]| {
        let mut args = vec!["generate", "--model", &model, "--prompt", "The "];
        args.extend(more);
        let (code, stdout, stderr) = run(args);
        assert_eq!(code, 0, "{stderr}");
        stdout
    };
    let greedy = generate(&["--max-new-tokens", "20"]);
    assert!(greedy.starts_with("The ") && greedy.ends_with('\n'), "{greedy}");
    assert_eq!(generate(&["--seed", "3", "--max-new-tokens", "20"]), greedy);
    let drawn = |seed| generate(&["--temperature", "1", "--top-k", "50", "--seed", seed]);
    assert_eq!(drawn("3"), drawn("3"));
    assert_ne!(drawn("3"), drawn("4"));

    let json: serde_json::Value = serde_json::from_str(&generate(&["--json"])).unwrap();
    // A window of 32: 4 of the prompt; the 29th new token is predicted from the last position and not appended.
    assert_eq!((json["finish"].as_str(), json["tokens"].as_array().unwrap().len()), (Some("context"), 29));
}

#[test]
fn prompts_and_models_that_do_not_fit_are_refused() {
    let small = SmallRun::new(1);
    let model = small.train().join("checkpoints/step-20").display().to_string();
    refused(["generate", "--model", &model, "--prompt", ""], 2, &["has 0 tokens", "1 to 31"]);
    refused(["generate", "--model", &model, "--prompt", "x", "--temperature=-1"], 2, &["--temperature is -1"]);
    refused(["generate", "--model", "nowhere", "--prompt", "x"], 2, &["nowhere"]);
}
