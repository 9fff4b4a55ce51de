//! Records of evaluation tasks from a folder.

use relufy_data::{Error, Silent, TaskData};

use crate::corpora::parquet;
use crate::support::shared;

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn real_tasks_are_complete() {
    let data = TaskData::local(shared("eval"));
    for (repo, config, split, count, field) in [
        ("allenai/ai2_arc", "ARC-Easy", "test", 2376, "answerKey"),
        ("allenai/ai2_arc", "ARC-Challenge", "validation", 299, "choices"),
        ("EleutherAI/lambada_openai", "default", "test", 5153, "text"),
        ("baber/piqa", "plain_text", "validation", 1838, "label"),
        ("Rowan/hellaswag", "default", "validation", 10042, "endings"),
        ("cais/mmlu", "anatomy", "dev", 5, "answer"),
    ] {
        let records = data.load_split(repo, config, split, &Silent).unwrap().records;
        assert_eq!(records.len(), count, "{repo}");
        assert!(records.iter().all(|record| record.contains_key(field)), "{repo}");
    }
    let splits = data.local_splits("cais/mmlu", "anatomy").unwrap().unwrap();
    assert_eq!(splits, ["dev", "test", "validation"]);
}

#[test]
fn parquet_is_read_and_trouble_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("org/task/main");
    std::fs::create_dir_all(&config).unwrap();
    std::fs::write(config.join("test.parquet"), parquet(&["a", "b"])).unwrap();
    std::fs::write(config.join("dev.jsonl"), "{\"a\": 1}\n{\"a\": }\n").unwrap();
    let data = TaskData::local(folder.path());
    let split = data.load_split("org/task", "main", "test", &Silent).unwrap();
    assert_eq!(
        serde_json::to_string(&split.records).unwrap(),
        r#"[{"text":"a","n":0},{"text":"b","n":1}]"#
    );
    let file = config.join("test.parquet");
    assert_eq!((split.place(1), &split.files[..]), ((&*file, 2), &[(file.clone(), 2)][..]));
    let error = data.load_split("org/task", "main", "dev", &Silent).unwrap_err().to_string();
    assert!(error.contains("dev.jsonl") && error.contains("line 2"), "{error}");
    let error = data.load_split("org/task", "main", "train", &Silent).unwrap_err();
    assert!(matches!(&error, Error::NoSplit { split, .. } if split == "train"), "{error}");
    assert!(error.to_string().contains("train.{jsonl,parquet}"), "{error}");
}
