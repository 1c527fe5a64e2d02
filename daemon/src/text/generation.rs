//! `{% generation %}`, by which templates mark what the assistant said for training.
//!
//! It changes nothing in a prompt, but the Jinja library does not know it: its tags become those of a
//! block without variables, which has the same scope.

const TAGS: [(&str, &str); 2] = [("generation", "with"), ("endgeneration", "endwith")];

/// The template with each such tag replaced; comments, expressions and raw text stay as they are.
pub(super) fn without_tags(source: String) -> String {
    if !source.contains("endgeneration") {
        return source;
    }
    let mut replaced = String::with_capacity(source.len());
    let mut rest = source.as_str();
    let mut is_raw = false;
    while let Some(at) = rest.find('{') {
        replaced.push_str(&rest[..at]);
        rest = &rest[at..];
        let len = match rest.as_bytes().get(1) {
            Some(b'%') => end_of(rest, "%}"),
            Some(b'{') if !is_raw => end_of(rest, "}}"),
            Some(b'#') if !is_raw => rest.find("#}").map_or(rest.len(), |end| end + 2),
            _ => 1,
        };
        let (tag, behind) = rest.split_at(len);
        let name = tag
            .trim_start_matches("{%")
            .trim_end_matches("%}")
            .trim_matches(['-', '+'])
            .trim();
        match TAGS
            .iter()
            .find(|(word, _)| tag.starts_with("{%") && name == *word)
        {
            Some((word, known)) if !is_raw => replaced.push_str(&tag.replacen(word, known, 1)),
            _ => replaced.push_str(tag),
        }
        if tag.starts_with("{%") {
            is_raw = name == "raw" || is_raw && name != "endraw";
        }
        rest = behind;
    }
    replaced.push_str(rest);
    replaced
}

/// Where a tag or expression ends that `text` begins with; what is quoted does not end it.
fn end_of(text: &str, end: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if text[at..].starts_with(end) => return at + end.len(),
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::without_tags;

    #[test]
    fn only_tags_are_replaced() {
        let check = |source: &str, expected: &str| {
            assert_eq!(without_tags(source.to_owned()), expected);
        };
        check(
            "a{%- generation -%}b{% endgeneration %}c{%+ if x %}",
            "a{%- with -%}b{% endwith %}c{%+ if x %}",
        );
        check(
            "{%generation%}{ {%endgeneration%}}",
            "{%with%}{ {%endwith%}}",
        );
        for kept in [
            "{# {% generation %} {% endgeneration %} #}",
            "{{ '{% generation %}{% endgeneration %}' ~ \"\\\"}}\" }}",
            "{% raw %}{% generation %}{{ {% endgeneration %}{% endraw %}",
            "{% set generation = 'endgeneration' %}",
            "{% generation",
            "{{ endgeneration",
            "generation endgeneration {",
        ] {
            check(kept, kept);
        }
    }
}
