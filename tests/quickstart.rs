//! The quickstart from end to end, with trainings of a few steps: it survives Ctrl-C, goes on
//! where it was, says when all is done, and leaves models and tables.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use relufy_model::Checkpoint;
use relufy_spec::Stage;

fn quickstart(folder: &Path, scale: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_relufy"));
    command.args(["quickstart", "--steps-scale", scale, "-o"]).arg(folder);
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stage_and_tokens(model: &Path) -> (Stage, u64) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let record = checkpoint.config().relufication.clone().unwrap();
    (record.stage, record.tokens_trained)
}

#[test]
fn it_goes_on_after_ctrl_c_and_ends_with_the_table() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("quickstart");

    let mut child =
        quickstart(&folder, "0.01").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !folder.join("s1/final").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        sleep(Duration::from_millis(1));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));

    let finished = quickstart(&folder, "0.01").output().unwrap();
    let told = stdout(&finished);
    assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    let line = |start: &str| told.lines().find(|line| line.contains(start)).unwrap().to_owned();
    assert!(line("train stage 1:").ends_with("(done already)"), "{told}");
    assert!(!line("evaluate s2").ends_with("(done already)"), "{told}");
    // 2 and 4 steps of 2048 tokens.
    assert_eq!(stage_and_tokens(&folder.join("s1/final")), (Stage::One, 4096));
    assert_eq!(stage_and_tokens(&folder.join("s2/final")), (Stage::Two, 12_288));
    let table = fs::read_to_string(folder.join("table.csv")).unwrap();
    assert_eq!(table.lines().count(), 8, "{table}");
    let markdown = fs::read_to_string(folder.join("table.md")).unwrap();
    assert!(markdown.contains("its numbers are no result"), "{markdown}");

    // The donor that is built in was trained on the text of this very world.
    let read = |file: &str| fs::read(folder.join(file)).unwrap();
    assert!(read("donor/tokenizer.json") == read("world/tokenizer/tokenizer.json"));

    let again = quickstart(&folder, "0.01").output().unwrap();
    assert!(stdout(&again).ends_with("Nothing was left to do.\n"), "{}", stdout(&again));
    let other = quickstart(&folder, "0.5").output().unwrap();
    let complaint = String::from_utf8_lossy(&other.stderr).into_owned();
    assert_eq!(other.status.code(), Some(2), "{complaint}");
    assert!(complaint.contains("--steps-scale: expected 0.01, found 0.5"), "{complaint}");
}

#[test]
fn a_folder_of_somebody_else_is_left_alone() {
    let temporary = tempfile::tempdir().unwrap();
    fs::write(temporary.path().join("thesis.tex"), "precious").unwrap();
    let output = quickstart(temporary.path(), "1").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("hint: choose another folder"));
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 1);
}
