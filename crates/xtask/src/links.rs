//! `cargo xtask links`: what the Markdown pages point at exists.
//!
//! Three things are looked at in README.md, ARCHITECTURE.md, CHANGELOG.md and docs/**/*.md:
//! relative links and images (from the page's folder, with `#heading` where the target is one
//! of these pages), `src` and `href` of inline HTML, and words in code that begin with one of
//! the repository's folders, such as `configs/micro/donor.toml` in an example command.
//! The network is never asked: links with a scheme are left alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::workspace;

/// Pages at the root; all of them must be there.
const PAGES: [&str; 3] = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"];

/// The folder whose Markdown pages are looked at too, at any depth.
const DOCS: &str = "docs";

/// Folders of the repository: a word in code that begins with one of them is a path.
const FOLDERS: [&str; 8] =
    [".cargo/", ".ci/", ".github/", "configs/", "crates/", "docs/", "scripts/", "tests/"];

/// The pages by their path from the root.
type Pages = BTreeMap<PathBuf, String>;

/// Something in a page that should exist.
#[derive(Debug, PartialEq, Eq)]
enum Reference {
    /// A link's destination, from the page's own folder.
    Link(String),
    /// A path in code, from the repository's root.
    Path(String),
}

/// Prints each reference that leads nowhere; an error if there is one.
pub fn run() -> Result<()> {
    let root = workspace::root()?;
    let pages = read_pages(&root)?;
    let broken = broken(&pages, &|path| root.join(path).exists());
    for line in &broken {
        println!("{line}");
    }
    if !broken.is_empty() {
        bail!("{} references of the Markdown pages lead nowhere", broken.len());
    }
    println!("links: {} pages, every link and path exists", pages.len());
    Ok(())
}

fn read_pages(root: &Path) -> Result<Pages> {
    let mut names: Vec<PathBuf> = PAGES.iter().map(PathBuf::from).collect();
    let mut folders = Vec::new();
    if root.join(DOCS).is_dir() {
        folders.push(PathBuf::from(DOCS));
    }
    while let Some(folder) = folders.pop() {
        let listing = fs::read_dir(root.join(&folder));
        for entry in listing.with_context(|| format!("cannot list {}", folder.display()))? {
            let entry = entry?;
            let name = folder.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                folders.push(name);
            } else if name.extension().is_some_and(|extension| extension == "md") {
                names.push(name);
            }
        }
    }
    let mut pages = Pages::new();
    for name in names {
        let text = fs::read_to_string(root.join(&name))
            .with_context(|| format!("cannot read {}", name.display()))?;
        pages.insert(name, text);
    }
    Ok(pages)
}

/// `page:line: what is wrong` for each reference that leads nowhere.
fn broken(pages: &Pages, exists: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let mut broken = Vec::new();
    for (page, text) in pages {
        for (line, reference) in references(text) {
            if let Some(objection) = objection(page, &reference, pages, exists) {
                broken.push(format!("{}:{line}: {objection}", page.display()));
            }
        }
    }
    broken
}

fn objection(
    page: &Path,
    reference: &Reference,
    pages: &Pages,
    exists: &dyn Fn(&Path) -> bool,
) -> Option<String> {
    let (written, path, heading) = match reference {
        Reference::Path(path) => (path, PathBuf::from(path), None),
        Reference::Link(link) => {
            let (path, heading) = link
                .split_once('#')
                .map_or((link.as_str(), None), |(path, heading)| (path, Some(heading)));
            let folder = page.parent().unwrap_or(Path::new(""));
            let target = match (path.is_empty(), path.strip_prefix('/')) {
                (true, _) => page.to_owned(),
                // As the forges read it: from the repository's root.
                (false, Some(from_root)) => PathBuf::from(from_root),
                (false, None) => folder.join(path),
            };
            (link, target, heading)
        }
    };
    let Some(path) = normalise(&path) else {
        return Some(format!("`{written}` leaves the repository"));
    };
    if !exists(&path) {
        return Some(format!("`{written}`: there is no {}", path.display()));
    }
    let (heading, text) = (heading?, pages.get(&path)?);
    (!headings(text).any(|slug| slug == heading))
        .then(|| format!("`{written}`: {} has no heading #{heading}", path.display()))
}

/// The path without `.` and `..`; nothing if it climbs out of the repository.
fn normalise(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::CurDir => {}
            Component::ParentDir if normal.pop() => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(normal)
}

/// The lines of a page with their numbers from 1; whether the line is in a fenced block.
/// Fences themselves are left out.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str, bool)> {
    let mut fence: Option<&str> = None;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let mark = ["```", "~~~"].into_iter().find(|mark| line.trim_start().starts_with(mark));
        match (fence, mark) {
            (None, Some(_)) => fence = mark,
            (Some(open), Some(mark)) if open == mark => fence = None,
            _ => return Some((index + 1, line, fence.is_some())),
        }
        None
    })
}

/// Everything in a page that should exist, with its line.
fn references(text: &str) -> Vec<(usize, Reference)> {
    let mut found = Vec::new();
    for (number, line, in_block) in lines(text) {
        if in_block {
            found.extend(paths(line).map(|path| (number, path)));
            continue;
        }
        // Between backticks stands code: every second piece. A link's text may hold code, its
        // destination may not, so destinations are found in the line without the code.
        let mut prose = String::new();
        for (index, piece) in line.split('`').enumerate() {
            if index % 2 == 1 {
                found.extend(paths(piece).map(|path| (number, path)));
            } else {
                prose.push_str(piece);
            }
        }
        found.extend(destinations(&prose).into_iter().map(|link| (number, Reference::Link(link))));
    }
    found
}

/// The relative destinations in a line without code: `](to)`, `[name]: to`, `src="to"`.
fn destinations(line: &str) -> Vec<String> {
    let mut found: Vec<&str> = Vec::new();
    for (open, close) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
        for rest in line.split(open).skip(1) {
            found.extend(rest.split(close).next());
        }
    }
    let definition = line.trim_start().strip_prefix('[').and_then(|rest| rest.split_once("]:"));
    found.extend(definition.map(|(_, destination)| destination));
    found
        .into_iter()
        // What follows a space is the link's title.
        .filter_map(|link| link.split_whitespace().next())
        .map(|link| link.trim_matches(['<', '>']))
        .filter(|link| !link.is_empty() && !has_scheme(link))
        .map(str::to_owned)
        .collect()
}

fn has_scheme(link: &str) -> bool {
    link.starts_with("//")
        || link.split_once(':').is_some_and(|(scheme, _)| {
            scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
        })
}

/// The words of a piece of code that are paths of the repository. A word with a placeholder
/// (`<name>`, `*`, `{a,b}`, `$X`, `...`) is checked up to the last folder before it.
fn paths(code: &str) -> impl Iterator<Item = Reference> {
    let separators = |c: char| c.is_whitespace() || "\"'=,;()".contains(c);
    code.split(separators).filter_map(|word| {
        let word = word.strip_prefix("./").unwrap_or(word);
        if !FOLDERS.iter().any(|folder| word.starts_with(folder)) {
            return None;
        }
        let placeholder =
            word.find(['<', '*', '{', '$', '[']).into_iter().chain(word.find("...")).min();
        let literal = placeholder
            .map_or(word, |at| word[..at].rsplit_once('/').map_or(word, |(folder, _)| folder));
        // `file.rs:12` names a line.
        let literal = literal.split(':').next().unwrap_or(literal);
        Some(Reference::Path(literal.trim_end_matches('.').to_owned()))
    })
}

/// The anchors of a page's headings as the forges make them: lower case, punctuation dropped,
/// spaces to hyphens.
fn headings(text: &str) -> impl Iterator<Item = String> {
    lines(text).filter(|(_, _, in_block)| !in_block).filter_map(|(_, line, _)| {
        let title = line.trim_start_matches('#');
        if title.len() == line.len() || !title.starts_with(' ') {
            return None;
        }
        let kept = title.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        Some(kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is broken in `docs/page.md` with this text, in a repository of three files.
    fn check(text: &str) -> Vec<String> {
        let readme = "# relufy\n## How fast is it?\n";
        let pages = Pages::from([
            (PathBuf::from("docs/page.md"), text.to_owned()),
            (PathBuf::from("README.md"), readme.to_owned()),
        ]);
        let there = ["docs/page.md", "README.md", "configs", "configs/a.toml"];
        broken(&pages, &|path| there.iter().any(|name| Path::new(name) == path))
    }

    #[test]
    fn links_that_exist_pass() {
        for good in [
            "[a](../README.md) and [b](../configs/a.toml \"title\")",
            "[a](../README.md#how-fast-is-it) ![b](</README.md>)",
            "[`code`](../README.md)",
            "# Here\n[a](#here)",
            "[a]: ../README.md",
            "<img src=\"../configs/a.toml\">",
            "[a](https://example.org/x.md) [b](mailto:a@b.c) [c](//example.org)",
            "`[a](nowhere.md)`",
            "```\n[a](nowhere.md)\n```",
        ] {
            assert_eq!(check(good), [""; 0], "{good}");
        }
    }

    #[test]
    fn links_that_lead_nowhere_are_named_with_their_line() {
        assert_eq!(check("x\n[a](no.md)"), ["docs/page.md:2: `no.md`: there is no docs/no.md"]);
        for bad in [
            "[a](../README.md) [b](no.md)",
            "[`code`](no.md)",
            "[a]: no.md",
            "<img src=\"no.png\">",
            "```\n```\n[a](no.md)",
        ] {
            assert_eq!(check(bad).len(), 1, "{bad}");
        }
    }

    #[test]
    fn a_missing_heading_is_named() {
        let said = check("[a](../README.md#how-slow)");
        assert_eq!(
            said,
            ["docs/page.md:1: `../README.md#how-slow`: README.md has no heading #how-slow"]
        );
        assert_eq!(check("```\n# here\n```\n[a](#here)").len(), 1);
    }

    #[test]
    fn links_out_of_the_repository_are_refused() {
        let said = check("[a](../../elsewhere/README.md)");
        assert_eq!(said, ["docs/page.md:1: `../../elsewhere/README.md` leaves the repository"]);
    }

    #[test]
    fn paths_in_code_are_checked_from_the_root() {
        for good in [
            "run `relufy train configs/a.toml`",
            "```sh\nrelufy train configs/a.toml --set x=1\n```",
            "`configs/*.toml` `configs/<name>/x.toml` `configs/a.toml:3` `./configs/a.toml`",
            "`other/no.toml` configs/no.toml",
        ] {
            assert_eq!(check(good), [""; 0], "{good}");
        }
        for bad in ["`configs/no.toml`", "```\nx --config=configs/no.toml\n```", "`tests/*.rs`"] {
            assert_eq!(check(bad).len(), 1, "{bad}");
        }
    }
}
