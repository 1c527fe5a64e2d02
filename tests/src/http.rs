//! A small HTTP/1.1 client, raw enough to send broken requests.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

use serde_json::Value;

use crate::wait;

/// One connection.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
}

/// Status line and headers of an answer.
#[derive(Debug, Clone)]
pub struct Head {
    /// Status code.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// The body, chunks joined.
    pub body: String,
}

/// `GET` over a connection of its own.
pub fn get(address: SocketAddr, path: &str) -> Reply {
    let mut connection = Connection::open(address);
    connection.send(format!("GET {path} HTTP/1.1\r\nhost: node\r\n\r\n").as_bytes());
    connection.reply()
}

/// `POST` of JSON over a connection of its own.
pub fn post(address: SocketAddr, path: &str, body: &Value) -> Reply {
    let mut connection = Connection::open(address);
    connection.send(&post_bytes(path, body.to_string().as_bytes()));
    connection.reply()
}

/// A `POST` request of these bytes as JSON.
pub fn post_bytes(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

impl Connection {
    /// Connects; reads and writes that take too long fail.
    pub fn open(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).unwrap())
    }

    /// Goes on with a connection that is open; reads and writes that take too long fail.
    pub fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(wait::DEADLINE)).unwrap();
        stream.set_write_timeout(Some(wait::DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            reader: BufReader::new(stream),
        }
    }

    /// Sends bytes as they are.
    ///
    /// # Panics
    /// When the node does not take them.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).unwrap();
    }

    /// Sends bytes as they are; the node may refuse them.
    ///
    /// # Errors
    /// When the connection is closed, or nothing is taken for too long.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// Says that nothing more will be sent.
    pub fn finish_sending(&self) {
        // Not connected any more is as good.
        let _ = self.reader.get_ref().shutdown(Shutdown::Write);
    }

    /// True when the node closes the connection without another byte.
    pub fn is_closed_silently(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.reader.read_to_end(&mut rest) {
            Ok(_) => rest.is_empty(),
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// Reads status line and headers.
    ///
    /// # Panics
    /// When there are none.
    pub fn head(&mut self) -> Head {
        self.try_head()
            .unwrap_or_else(|| panic!("the connection was closed without an answer"))
    }

    /// Reads status line and headers; `None` when the connection is closed before them.
    pub fn try_head(&mut self) -> Option<Head> {
        let status_line = self.line().ok().filter(|line| !line.is_empty())?;
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|word| word.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line: {status_line:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.line().unwrap();
            if line.is_empty() {
                return Some(Head { status, headers });
            }
            let (name, value) = line.split_once(':').unwrap();
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// Reads a whole answer.
    ///
    /// # Panics
    /// When it is cut short.
    pub fn reply(&mut self) -> Reply {
        self.try_reply()
            .unwrap_or_else(|| panic!("the connection was closed without an answer"))
    }

    /// Reads a whole answer; `None` when the connection is closed before it.
    ///
    /// # Panics
    /// When it is cut short.
    pub fn try_reply(&mut self) -> Option<Reply> {
        let head = self.try_head()?;
        let mut body = Vec::new();
        match (
            head.header("content-length"),
            head.header("transfer-encoding"),
        ) {
            (Some(length), _) => {
                body.resize(length.parse().unwrap(), 0);
                self.reader.read_exact(&mut body).unwrap();
            }
            (None, Some("chunked")) => {
                while let Some(chunk) = self.chunk().unwrap() {
                    body.extend(chunk);
                }
            }
            (None, _) => {
                self.reader.read_to_end(&mut body).unwrap();
            }
        }
        let body = String::from_utf8(body).unwrap();
        Some(Reply {
            status: head.status,
            headers: head.headers,
            body,
        })
    }

    /// Reads the next chunk of a chunked body; `None` after the last.
    ///
    /// # Errors
    /// When the body is cut short.
    pub fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line()?;
        let len = usize::from_str_radix(&line, 16)
            .map_err(|_| io::Error::new(io::ErrorKind::UnexpectedEof, format!("chunk {line:?}")))?;
        let mut chunk = vec![0; len + 2];
        self.reader.read_exact(&mut chunk)?;
        chunk.truncate(len);
        Ok((0 < len).then_some(chunk))
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }
}

impl Head {
    /// Value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

impl Reply {
    /// Value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    /// Events of a stream, which must end with `[DONE]`.
    ///
    /// # Panics
    /// When it does not.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self
            .body
            .split("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{self:?}");
        data.into_iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }

    /// Fails unless this is an error in OpenAI's shape with this status, code and field.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn must_be_error(&self, status: u16, code: &str, param: Option<&str>) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(
            self.header("content-type"),
            Some("application/json"),
            "{self:?}"
        );
        let body = self.json();
        let error = &body["error"];
        assert_eq!(error["code"], code, "{self:?}");
        assert_eq!(error["param"].as_str(), param, "{self:?}");
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{self:?}"
        );
        let kind = match status {
            401 | 403 => "authentication_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        assert_eq!(error["type"], kind, "{self:?}");
    }
}

fn header<'h>(headers: &'h [(String, String)], name: &str) -> Option<&'h str> {
    headers
        .iter()
        .find(|(known, _)| known == name)
        .map(|(_, value)| value.as_str())
}
