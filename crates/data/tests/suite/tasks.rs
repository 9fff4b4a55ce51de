//! Records of evaluation tasks from a folder.

use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use relufy_data::taskdata::load_file;
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
    let why = error.to_string();
    assert!(why.contains("train.{jsonl,parquet}") && why.contains("there is dev, test"), "{why}");
    let error = data.load_split("org/task", "other", "test", &Silent).unwrap_err();
    assert!(error.to_string().contains("there is no such folder"), "{error}");
}

/// A column of a parquet file, with the levels that say where its values stand.
enum Column<'a> {
    Texts(&'a [&'a str], &'a [i16], &'a [i16]),
    Numbers(&'a [i64]),
}

fn write_parquet(path: &Path, schema: &str, columns: &[Column<'_>]) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for content in columns {
        let mut column = group.next_column().unwrap().unwrap();
        match content {
            Column::Texts(texts, defined, repeated) => {
                let texts: Vec<ByteArray> = texts.iter().map(|t| ByteArray::from(*t)).collect();
                let column = column.typed::<ByteArrayType>();
                column.write_batch(&texts, Some(defined), Some(repeated)).unwrap();
            }
            Column::Numbers(numbers) => {
                let defined = vec![1; numbers.len()];
                column.typed::<Int64Type>().write_batch(numbers, Some(&defined), None).unwrap();
            }
        }
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

/// The shapes that the datasets library writes: a struct of lists (ai2_arc), a list and a
/// class label (MMLU), plain columns (BoolQ). Records are those of JSON lines.
#[test]
fn parquet_and_jsonl_give_the_same_records() {
    let folder = tempfile::tempdir().unwrap();
    let list = |name: &str| {
        format!(
            "optional group {name} (LIST) {{ repeated group list {{ optional binary element (STRING); }} }}"
        )
    };
    let (texts, labels) = (list("text"), list("label"));
    let (question, key) =
        ("optional binary question (STRING);", "optional binary answerKey (STRING);");
    let choices = list("choices");
    // Two records, the second with three of what the first has two of.
    let (in_struct, in_list, repeated) = ([4; 5], [3; 5], [0, 1, 0, 1, 1]);
    let (plain, once) = ([1; 2], [0; 2]);
    let two = |texts| Column::Texts(texts, &plain, &once);
    for (name, schema, columns, lines) in [
        (
            "arc",
            format!(
                "message m {{ {question} optional group choices {{ {texts} {labels} }} {key} }}"
            ),
            vec![
                two(&["P?", "Q?"]),
                Column::Texts(&["a", "é\n", "b", "", "c"], &in_struct, &repeated),
                Column::Texts(&["A", "B", "1", "2", "3"], &in_struct, &repeated),
                two(&["B", "3"]),
            ],
            [
                r#"{"question":"P?","choices":{"text":["a","é\n"],"label":["A","B"]},"answerKey":"B"}"#,
                r#"{"question":"Q?","choices":{"text":["b","","c"],"label":["1","2","3"]},"answerKey":"3"}"#,
            ],
        ),
        (
            "mmlu",
            format!("message m {{ {question} {choices} optional int64 answer; }}"),
            vec![
                two(&["P?", "Q?"]),
                Column::Texts(&["a", "b", "c", "d", "e"], &in_list, &repeated),
                Column::Numbers(&[1, 2]),
            ],
            [
                r#"{"question":"P?","choices":["a","b"],"answer":1}"#,
                r#"{"question":"Q?","choices":["c","d","e"],"answer":2}"#,
            ],
        ),
        (
            "boolq",
            "message m { optional binary passage (STRING); optional int64 label; }".to_owned(),
            vec![two(&["P.", "Q."]), Column::Numbers(&[0, -1])],
            [r#"{"passage":"P.","label":0}"#, r#"{"passage":"Q.","label":-1}"#],
        ),
    ] {
        write_parquet(&folder.path().join(name).with_extension("parquet"), &schema, &columns);
        std::fs::write(folder.path().join(name).with_extension("jsonl"), lines.join("\n")).unwrap();
        let load =
            |ending| load_file(&folder.path().join(name).with_extension(ending)).unwrap().records;
        let text = serde_json::to_string(&load("parquet")).unwrap();
        assert_eq!(text, format!("[{}]", lines.join(",")), "{name}");
        assert_eq!(load("parquet"), load("jsonl"), "{name}");
    }
}
