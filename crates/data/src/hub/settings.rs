//! Where the hub is and where its files are kept: the variables that Hugging Face's
//! tools know.

use std::env;
use std::path::PathBuf;

use crate::{Error, Result};

/// Where the hub is, where its files are kept, and who asks.
#[derive(Clone)]
pub struct HubSettings {
    /// Address of the hub, without a slash at the end.
    pub endpoint: String,
    /// Folder of the cache (the one that holds `models--org--name`).
    pub cache: PathBuf,
    /// Sent as a bearer token, where given.
    pub token: Option<String>,
    /// Never ask the hub, use the cache alone.
    pub offline: bool,
}

// By hand, so that no log ever shows the token.
impl std::fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "set"))
            .field("offline", &self.offline)
            .finish()
    }
}

impl HubSettings {
    /// Reads `HF_ENDPOINT`; `HF_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`; `HF_TOKEN`, else
    /// the file that `HF_TOKEN_PATH` names, else `HF_HOME/token`; `HF_HUB_OFFLINE`
    /// (`1`, `on`, `yes`, `true`).
    ///
    /// # Errors
    /// [`Error::Config`] where no variable names a cache and there is no home folder.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(|key| env::var(key).ok(), env::home_dir())
    }

    /// [`HubSettings::from_env`] over any source of variables.
    fn from_lookup(get: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Result<Self> {
        let get = |key: &str| get(key).filter(|value| !value.is_empty());
        let hf_home = get("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| get("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("huggingface")))
            .or_else(|| home.map(|dir| dir.join(".cache").join("huggingface")));
        let cache = get("HF_HUB_CACHE")
            .map(PathBuf::from)
            .or_else(|| hf_home.as_ref().map(|dir| dir.join("hub")))
            .ok_or_else(|| Error::config("HF_HOME", "is not set, and there is no home folder"))?;
        let token_file = get("HF_TOKEN_PATH")
            .map(PathBuf::from)
            .or_else(|| hf_home.map(|dir| dir.join("token")));
        let token = get("HF_TOKEN")
            .or_else(|| token_file.and_then(|file| std::fs::read_to_string(file).ok()))
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let offline = get("HF_HUB_OFFLINE").is_some_and(|value| {
            matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")
        });
        Ok(HubSettings {
            endpoint: get("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_owned())
                .trim_end_matches('/')
                .to_owned(),
            // hf-hub makes relative links between files of the cache.
            cache: std::path::absolute(&cache).map_err(|e| Error::io(&cache, e))?,
            token,
            offline,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> HubSettings {
        let get = |key: &str| vars.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned());
        HubSettings::from_lookup(get, Some(PathBuf::from("/home/x"))).unwrap()
    }

    #[test]
    fn variables_and_defaults() {
        let plain = settings(&[]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, PathBuf::from("/home/x/.cache/huggingface/hub"));
        assert!(!plain.offline && plain.token.is_none());

        let set = settings(&[
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HOME", "/hf"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "TRUE"),
        ]);
        assert_eq!(set.endpoint, "http://mirror");
        assert_eq!(set.cache, PathBuf::from("/hf/hub"));
        assert_eq!(set.token.as_deref(), Some("secret"));
        assert!(set.offline);
        assert!(!format!("{set:?}").contains("secret"));

        let cache =
            settings(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "0")]);
        assert_eq!(cache.cache, PathBuf::from("/c"));
        assert!(!cache.offline);
        assert!(HubSettings::from_lookup(|_| None, None).is_err());
    }
}
