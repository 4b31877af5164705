//! The page at `/`.

use std::fmt::Write;
use std::sync::LazyLock;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use sha2::{Digest, Sha256};

const PAGE: &str = include_str!("page/index.html");

/// The headers of the page besides its type.
const HEADERS: [(header::HeaderName, &str); 4] = [
    (header::CACHE_CONTROL, "no-cache"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
];

/// The page, with a policy that allows its own script and style, connections to this server and nothing else.
pub(crate) async fn page() -> Response {
    static POLICY: LazyLock<String> = LazyLock::new(|| policy(PAGE));
    let mut response = Response::new(Body::from(PAGE));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    if let Ok(policy) = HeaderValue::from_str(&POLICY) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The policy for the inline scripts and styles of a page.
fn policy(page: &str) -> String {
    let mut policy = String::from(
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; ",
    );
    policy.push_str("connect-src 'self'; img-src 'self' data: blob:");
    for (directive, tag) in [("script-src", "script"), ("style-src", "style")] {
        let _ = write!(policy, "; {directive}");
        for text in inline(page, tag) {
            let _ = write!(policy, " 'sha256-{}'", base64::encode(Sha256::digest(text)));
        }
    }
    policy
}

/// The contents of the elements `tag` of a page.
fn inline<'p>(page: &'p str, tag: &str) -> Vec<&'p str> {
    let (open, close) = (format!("<{tag}"), format!("</{tag}>"));
    let content = |rest: &'p str| {
        let start = rest.find('>')? + 1;
        let end = rest.find(&close)?;
        rest.get(start..end)
    };
    page.split(&open).skip(1).filter_map(content).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_its_scripts_are_in_the_policy() {
        assert!(PAGE.len() <= 60 << 10, "{} bytes", PAGE.len());
        let policy = policy("<style>a{}</style><script type=\"module\">x()</script>");
        let hash = |text: &str| format!("'sha256-{}'", base64::encode(Sha256::digest(text)));
        assert!(policy.contains(&format!("script-src {}", hash("x()"))), "{policy}");
        assert!(policy.ends_with(&format!("style-src {}", hash("a{}"))), "{policy}");
        let own = super::policy(PAGE);
        assert!(!own.contains("unsafe") && own.is_ascii(), "{own}");
        // Handlers and styles in attributes would be blocked.
        assert!(!PAGE.contains(" onclick=") && !PAGE.contains(" style="));
    }
}
