//! Who may use the server: API keys, and the pages of which origins.

use axum::http::{HeaderMap, StatusCode, Uri, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::error::ApiError;
use super::options::is_local;

/// The rules of a server.
pub(crate) struct Access {
    /// Digests of the keys. Comparing them takes the same time for keys of every length.
    keys: Vec<[u8; 32]>,
    /// Origins that may use the server.
    origins: Vec<String>,
    /// Whether only this machine can connect, and without a key.
    local_only: bool,
}

impl Access {
    pub fn new(keys: &[String], origins: &[String], local: bool) -> Self {
        let digest = |key: &String| Sha256::digest(key.as_bytes()).into();
        Self {
            keys: keys.iter().map(digest).collect(),
            origins: origins.iter().map(|o| o.trim_end_matches('/').to_owned()).collect(),
            local_only: local && keys.is_empty(),
        }
    }

    /// Checks the key of a request.
    ///
    /// # Errors
    /// 401 for a missing or wrong key.
    pub fn check_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let sent = headers.get(header::AUTHORIZATION).map_or(&[][..], |value| value.as_bytes());
        let sent = match sent.split_at_checked(7) {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
            _ => &[],
        };
        let digest: [u8; 32] = Sha256::digest(sent).into();
        // All keys are compared, whichever fits.
        let fits = self.keys.iter().fold(Choice::from(0), |any, key| any | key.ct_eq(&digest));
        if bool::from(fits) {
            return Ok(());
        }
        let message = if sent.is_empty() {
            "This server needs an API key: send the header `Authorization: Bearer KEY`."
        } else {
            "The API key is wrong."
        };
        let error = ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Err(error.with_code("invalid_api_key"))
    }

    /// Keeps pages of other sites from using the server through the browser of a user: by requests across origins, or
    /// by a name that they have pointed at this machine.
    ///
    /// # Errors
    /// 403 for such a request.
    pub fn check_origin(&self, headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let host = text(header::HOST).or(uri.authority().map(|a| a.as_str())).unwrap_or_default();
        let name = host.parse::<axum::http::uri::Authority>().ok();
        if self.local_only && !name.is_some_and(|name| is_local(name.host())) {
            let message = format!(
                "The host {host:?} is not this machine. A server without an API key answers only to localhost."
            );
            return Err(ApiError::new(StatusCode::FORBIDDEN, "permission_error", message));
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        let own = origin.split_once("://").is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(host));
        if own || self.origins.iter().any(|allowed| allowed == "*" || allowed == origin) {
            return Ok(());
        }
        let message =
            format!("Pages of {origin:?} may not use this server; --cors-origin allows it.");
        Err(ApiError::new(StatusCode::FORBIDDEN, "permission_error", message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(header::HeaderName, &str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn only_known_keys_pass() {
        let access = Access::new(&["one".into(), "two".into()], &[], true);
        let check =
            |value: &str| access.check_key(&headers(&[(header::AUTHORIZATION, value)])).is_ok();
        assert!(check("Bearer one") && check("bearer two"));
        assert!(!check("Bearer three") && !check("Basic one") && !check("one") && !check(""));
        assert!(access.check_key(&HeaderMap::new()).is_err());
        assert!(Access::new(&[], &[], true).check_key(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn other_sites_are_kept_out() {
        let check = |access: &Access, host: &str, origin: Option<&str>| {
            let mut list = vec![(header::HOST, host)];
            list.extend(origin.map(|o| (header::ORIGIN, o)));
            access.check_origin(&headers(&list), &Uri::from_static("/")).is_ok()
        };
        let local = Access::new(&[], &[], true);
        assert!(check(&local, "localhost:8080", None) && check(&local, "[::1]:8080", None));
        assert!(check(&local, "127.0.0.1:8080", Some("http://127.0.0.1:8080")));
        assert!(!check(&local, "evil.example:8080", None));
        assert!(!check(&local, "localhost:8080", Some("https://evil.example")));
        assert!(!check(&local, "localhost:8080", Some("null")));
        let open = Access::new(&["k".into()], &["https://a.example".into()], false);
        assert!(check(&open, "server.example", None));
        assert!(check(&open, "server.example", Some("https://a.example")));
        assert!(!check(&open, "server.example", Some("https://b.example")));
    }
}
