//! Documents from every kind of file, and what is said about broken ones.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use relufy_data::corpus::{Format, Layout, SourceConfig, TextSplit, documents};
use relufy_data::{CorpusConfig, Document, Error, Result};

use crate::support::{no_hub, shared};

fn zst(text: &[u8]) -> Vec<u8> {
    zstd::encode_all(text, 3).unwrap()
}

fn gz(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// Two columns, `text` and `n`.
pub fn parquet(texts: &[&str]) -> Vec<u8> {
    let schema = "message m { required binary text (UTF8); required int64 n; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let values: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
    column.close().unwrap();
    let numbers: Vec<i64> = (0..texts.len() as i64).collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

fn read(source: &SourceConfig) -> Result<Vec<Document>> {
    documents(source, &no_hub(Path::new("/")))?.collect()
}

fn texts(source: &SourceConfig) -> Vec<String> {
    read(source).unwrap().into_iter().map(|document| document.text).collect()
}

fn source(path: &Path) -> SourceConfig {
    SourceConfig::new(path.to_str().unwrap())
}

#[test]
fn every_format_plain_and_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let lines = b"{\"text\": \"one\"}\n\n{\"text\": \"\"}\r\n{\"text\": \"two\", \"x\": 1}";
    let contents: [(&str, Vec<u8>, &[&str]); 3] = [
        ("a.txt", b"\xef\xbb\xbfone\ntwo\n".to_vec(), &["one\ntwo\n"]),
        ("b.jsonl", lines.to_vec(), &["one", "two"]),
        ("c.parquet", parquet(&["one", "", "two"]), &["one", "two"]),
    ];
    for (name, content, expected) in &contents {
        let packed = [("", content.clone()), (".zst", zst(content)), (".gz", gz(content))];
        for (ending, bytes) in packed {
            let path = folder.path().join(format!("{name}{ending}"));
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(texts(&source(&path)), *expected, "{}", path.display());
        }
    }
    // A folder goes through its files in order, and into its subfolders.
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    std::fs::write(folder.path().join("sub/d.txt"), "deep").unwrap();
    std::fs::write(folder.path().join("notes.bin"), "no text").unwrap();
    std::fs::write(folder.path().join(".hidden.txt"), "no text").unwrap();
    let all = texts(&source(folder.path()));
    assert_eq!((all.len(), all[15].as_str()), (16, "deep"));
    let globbed = texts(&source(&folder.path().join("*.jsonl*")));
    assert_eq!(globbed, ["one", "two"].repeat(3));
    let limited = SourceConfig { limit: Some(3), ..source(folder.path()) };
    assert_eq!(texts(&limited).len(), 3);
    let forced = SourceConfig {
        format: Some(Format::Text),
        split: Some(TextSplit::Line),
        ..source(&folder.path().join("b.jsonl"))
    };
    assert_eq!(texts(&forced).len(), 3);
}

#[test]
fn text_files_are_split_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    std::fs::write(&path, "one\nstill one\r\n\n \ntwo<|end|>\nthree<|end|").unwrap();
    let with = |split, separator: Option<&str>| {
        texts(&SourceConfig { split, separator: separator.map(str::to_owned), ..source(&path) })
    };
    assert_eq!(with(Some(TextSplit::File), None).len(), 1);
    assert_eq!(
        with(Some(TextSplit::Line), None),
        ["one", "still one", " ", "two<|end|>", "three<|end|"]
    );
    assert_eq!(
        with(Some(TextSplit::BlankLine), None),
        ["one\nstill one", "two<|end|>\nthree<|end|"]
    );
    assert_eq!(with(None, Some("<|end|>")), ["one\nstill one\r\n\n \ntwo", "three<|end|"]);
}

#[test]
fn prompts_are_masked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    let lines = r#"{"prompt": "2+2=", "completion": "4"}
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
        {"text": "plain", "messages": 7}"#;
    std::fs::write(&path, lines).unwrap();
    let found = read(&source(&path)).unwrap();
    assert_eq!(found[0], Document { text: "2+2=4".to_owned(), masked: vec![0..4] });
    assert_eq!(found[1].text, "User: Hi\nAssistant: Ho\n");
    assert_eq!(found[1].masked, [0..20]);
    assert_eq!(found[2], Document { text: "plain".to_owned(), masked: vec![] });
    let strict = SourceConfig { layout: Some(Layout::Messages), ..source(&path) };
    assert!(read(&strict).unwrap_err().to_string().contains("line 1"));
}

/// The message names the file, where in it, and what is wrong.
#[test]
fn broken_records_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = "{\"text\": \"a line long enough that cutting the file cuts it\"}\n".repeat(500);
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() - 20].to_vec();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        (
            "no.jsonl",
            b"{\"text\": \"a\"}\n\n{\"text\": }\n".to_vec(),
            &["line 3", "is not JSON (column 10)"],
        ),
        ("list.jsonl", b"[1]".to_vec(), &["line 1", "expected a JSON object, found [1]"]),
        ("field.jsonl", b"{\"body\": \"a\"}".to_vec(), &["line 1", "no field `text`", "body"]),
        (
            "type.jsonl",
            b"{\"text\": [1]}".to_vec(),
            &["line 1", "should be a string, but is a list"],
        ),
        (
            "utf8.jsonl",
            b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}".to_vec(),
            &["line 2", "not UTF-8 (byte 10"],
        ),
        ("utf8.txt", b"ab\xc3".to_vec(), &["document 1", "not UTF-8 (byte 2"]),
        ("cut.jsonl.zst", cut(zst(good.as_bytes())), &["incomplete frame"]),
        ("cut.jsonl.gz", cut(gz(good.as_bytes())), &["line "]),
        ("cut.txt.zst", cut(zst(good.as_bytes())), &["incomplete frame"]),
        ("plain.jsonl.zst", b"{\"text\": \"a\"}".to_vec(), &["frame descriptor"]),
        ("plain.jsonl.gz", b"{\"text\": \"a\"}".to_vec(), &["gzip header"]),
        ("cut.parquet", cut(parquet(&["a"])), &["arquet"]),
        ("zero.parquet", vec![], &["arquet"]),
        ("unknown.dat", b"a".to_vec(), &["set `format`"]),
    ];
    for (name, bytes, expected) in cases {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let message = read(&source(&path)).unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
        for part in expected {
            assert!(message.contains(part), "{message}");
        }
    }
    let column = SourceConfig { text_field: Some("body".to_owned()), ..source(Path::new("")) };
    let path = folder.path().join("good.parquet");
    std::fs::write(&path, parquet(&["a"])).unwrap();
    let column = SourceConfig { path: path.to_str().unwrap().to_owned(), ..column };
    let message = read(&column).unwrap_err().to_string();
    assert!(message.contains("no column body: its columns are text, n"), "{message}");
    let number = SourceConfig { text_field: Some("n".to_owned()), ..column };
    let message = read(&number).unwrap_err().to_string();
    assert!(message.contains("row 1: field `n` should be a string, but is a number"), "{message}");

    // After an error the walk is over.
    let path = folder.path().join("no.jsonl");
    let walk: Vec<_> = documents(&source(&path), &no_hub(Path::new("/"))).unwrap().collect();
    assert_eq!(walk.len(), 2);
    let missing = read(&source(&folder.path().join("nothing.txt"))).unwrap_err();
    assert!(missing.to_string().contains("there is no such file"), "{missing}");
    let nothing = read(&source(&folder.path().join("*.md"))).unwrap_err();
    assert!(nothing.to_string().contains("no corpus file"), "{nothing}");
}

#[test]
fn settings_that_contradict_each_other() {
    let parse = |toml: &str| serde_json::from_str::<CorpusConfig>(toml);
    assert!(parse(r#"{"sources": [{"path": "a", "txt_field": "b"}]}"#).is_err());
    assert!(parse(r#"{"sources": [{"path": "a"}], "valid": 1}"#).is_err());
    let config = parse(r#"{"sources": [{"path": "a", "split": "blank_line"}]}"#).unwrap();
    assert!(config.add_eos && CorpusConfig::default().add_eos);
    assert_eq!(config.sources[0].split, Some(TextSplit::BlankLine));
    let bad = |source: SourceConfig| {
        assert!(matches!(read(&source), Err(Error::Config { .. })), "{source:?}");
    };
    let base = || SourceConfig::new("a");
    bad(SourceConfig::new(""));
    bad(SourceConfig { separator: Some(String::new()), ..base() });
    bad(SourceConfig { separator: Some("x".into()), split: Some(TextSplit::File), ..base() });
    bad(SourceConfig { weight: Some(f64::NAN), ..base() });
    bad(SourceConfig { limit: Some(0), ..base() });
    bad(SourceConfig { split: Some(TextSplit::Line), format: Some(Format::Jsonl), ..base() });
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn real_corpora() {
    let first = |name: &str, count| {
        let source = SourceConfig { limit: Some(count), ..source(&shared("corpora").join(name)) };
        texts(&source)
    };
    let articles = first("wikipedia-2018.jsonl.zst", 20);
    assert!(articles.len() == 20 && articles[0].starts_with("Anarchism\n\n"));
    assert!(first("english-novels.jsonl.zst", 2)[0].contains("CLARA VAUGHAN"));
    assert!(first("stories3m-samples.jsonl.zst", 50).iter().all(|story| story.len() > 50));
    let wikitext = first("wikitext-2-raw-test.txt.zst", 9);
    assert_eq!((wikitext.len(), wikitext[0].len()), (1, 1_290_590));
}
