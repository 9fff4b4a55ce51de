//! Densities that are forced, as a person writes them.

use std::str::FromStr;

use relufy_spec::flops::SiteDensities;

/// Densities at queries, keys and values, at up, and at down, with a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Forced {
    pub name: String,
    pub densities: SiteDensities,
}

impl Forced {
    /// The densities that the paper reports for Llama 7B at stage 2.
    pub fn llama() -> Forced {
        Forced { name: "Llama's 49/33/35 %".to_owned(), densities: of([49.0, 33.0, 35.0]) }
    }

    /// Those of Falcon 7B at stage 2.
    pub fn falcon() -> Forced {
        Forced { name: "Falcon's 44/44/5 %".to_owned(), densities: of([44.0, 44.0, 5.0]) }
    }
}

fn of([qkv, up, down]: [f64; 3]) -> SiteDensities {
    SiteDensities { qkv: qkv / 100.0, o: 1.0, up: up / 100.0, down: down / 100.0 }
}

impl FromStr for Forced {
    type Err = String;

    fn from_str(text: &str) -> Result<Forced, String> {
        match text {
            "llama" => return Ok(Forced::llama()),
            "falcon" => return Ok(Forced::falcon()),
            _ => {}
        }
        let numbers: Option<Vec<f64>> =
            text.split(',').map(|number| number.trim().parse().ok()).collect();
        let Some([qkv, up, down]) = numbers.as_deref() else {
            return Err("expected llama, falcon, or three densities in per cent: 49,33,35".into());
        };
        let all = [*qkv, *up, *down];
        if !all.iter().all(|percent| (0.0..=100.0).contains(percent)) {
            return Err("densities are per cent, 0 to 100".into());
        }
        if all.iter().all(|percent| *percent <= 1.0) && all.iter().any(|p| p.fract() > 0.0) {
            return Err("densities are in per cent: 49,33,35 and not 0.49,0.33,0.35".into());
        }
        Ok(Forced { name: format!("{qkv}/{up}/{down} %"), densities: of(all) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn densities_are_named_or_per_cent() {
        assert_eq!("llama".parse(), Ok(Forced::llama()));
        let found: Forced = "44, 44,5".parse().unwrap();
        assert_eq!((&found.name[..], found.densities), ("44/44/5 %", Forced::falcon().densities));
        assert!("0,0,0".parse::<Forced>().is_ok() && "1,1,1".parse::<Forced>().is_ok());
        for (text, why) in [
            ("opt", "expected llama, falcon"),
            ("1,2", "three densities"),
            ("1,2,3,4", "three densities"),
            ("1,2,x", "three densities"),
            ("1,2,101", "0 to 100"),
            ("1,2,-1", "0 to 100"),
            ("1,2,nan", "0 to 100"),
            ("0.49,0.33,0.35", "in per cent: 49,33,35"),
        ] {
            let found = text.parse::<Forced>().unwrap_err();
            assert!(found.contains(why), "{text}: {found}");
        }
    }
}
